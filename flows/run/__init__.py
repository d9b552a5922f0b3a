"""A run: what is asked for, what is carried out, what is noted of it. Knows nothing of Prefect."""
