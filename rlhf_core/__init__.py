"""RLHF on torch and transformers: data, models, objectives, trainers, evaluation. Knows no orchestrator."""
