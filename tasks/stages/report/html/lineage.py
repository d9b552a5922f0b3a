"""Which bytes went in and which came out, stage by stage, as SHA-256."""

from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.state.atomic import digest_of, tree_digest
from tasks import paths
from tasks.frame.definition import stage_definition
from tasks.stages.report.html.sources import stages_of
from tasks.stages.report.html.words import flattened


class Link(NamedTuple):
    """One stage: the digest of each data input and of its output, and every file of the output with its own."""

    stage: str
    inputs: list[tuple[str, str]]
    output: str
    digest: str
    files: list[tuple[str, str]]


def lineage(root: Path, candidates: tuple[str, ...]) -> list[Link]:
    """Return the links of the stages whose outputs are there.

    The digest of a folder is the SHA-256 of the canonical JSON of its files' names and digests. Code and
    parameters are inputs too: parameters stand in full on the page, code by the commit and in `dvc.lock`.
    """
    digests: dict[str, dict[str, str]] = {}

    def files_of(name: str) -> dict[str, str]:
        if name not in digests:
            digests[name] = tree_digest(root / name)
        return digests[name]

    links = []
    for name in stages_of(candidates):
        output = paths.stage_output(name).as_posix()
        if not (root / output).is_dir():
            continue
        inputs = [dep for dep in stage_definition(root, name).deps if _is_data(root, dep)]
        links.append(
            Link(
                stage=name,
                inputs=[(dep, digest_of(files_of(dep))) for dep in inputs],
                output=output,
                digest=digest_of(files_of(output)),
                files=list(files_of(output).items()),
            )
        )
    return links


def _is_data(root: Path, dep: str) -> bool:
    return dep.partition("/")[0] in ("data", "artifacts") and (root / dep).is_dir()


def parameter_rows(params: Any) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the parameters by section, each as (dotted name, value) rows."""
    sections: list[tuple[str, list[tuple[str, Any]]]] = [("run", [])]
    for key, value in params.model_dump(mode="json", by_alias=True).items():
        if isinstance(value, dict):
            sections.append((key, list(flattened(value).items())))
        else:
            sections[0][1].append((key, value))
    return sections
