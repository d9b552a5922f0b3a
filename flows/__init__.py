"""The control plane: Prefect flows, the local servers, the `rlhf` command. Only this package imports prefect."""
