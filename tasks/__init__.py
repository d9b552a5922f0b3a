"""The stages of the pipeline as programs from files to files, and the edges to DVC and MLflow."""
