"""What a stage says that should be looked at although it goes on."""

from tasks.frame.stage import Stage


def warn(stage: Stage, text: str) -> None:
    """Print one line `warning: ...`, and note it in the stage's progress stream; only its first process does."""
    if stage.place.rank == 0:
        stage.log.event("warning", message=text)
        print(f"warning: {text}", flush=True)
