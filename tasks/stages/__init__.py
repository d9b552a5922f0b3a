"""The stages: a folder each, whose `run.py` holds `run(stage) -> figures`, and what several of them share."""
