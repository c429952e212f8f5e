"""The model card of a release: README.md, with the front matter that the hub reads.

The same records give the same bytes. No path, URL or host of the person who made it is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict

from jobs.quantities import size
from jobs.release.contents import Contents, FinishedRun
from jobs.release.loading import Place, load_commands
from jobs.release.markdown import Markdown, block, code, render, yaml_text
from jobs.release.origin import LICENSE_ID, REPOSITORY, License
from jobs.release.quality import measured_on, quality_rows
from pipeline.errors import PipelineError
from pipeline.export.code_formats import code_format
from pipeline.run.records import CODES_PREFIX
from pipeline.storage.record import STRICT
from quantizer.schemes import Scheme

_LIBRARIES = {"kerashub": "keras-hub", "keras": "keras"}
_FOR_VECTORS = ("feature-extraction", "sentence-similarity")
# A data set of the hub is public, and its name says something; what else is asked of it does not.
_HUB_TEXTS = re.compile(r"(hf:[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*){1,2})(?:\?.*)?", re.ASCII)
_MOST_REASONS = 12


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a person says of a release, where its source does not.

    Attributes:
        base_model: repository of the source on the hub.
        license: the hub's name of the license.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    base_model: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if self.base_model and not REPOSITORY.fullmatch(self.base_model):
            raise PipelineError(
                f"--base-model {self.base_model!r}: not a repository of the hub; write it as "
                "owner/name"
            )
        if self.license and not LICENSE_ID.fullmatch(self.license):
            raise PipelineError(
                f"--license {self.license!r}: not a license as the hub names them, such as "
                "apache-2.0, mit or other"
            )

    def over(self, earlier: CardSettings) -> CardSettings:
        """These settings, with earlier ones where there is none."""
        return CardSettings(
            base_model=self.base_model or earlier.base_model,
            license=self.license or earlier.license,
        )


def model_card(contents: Contents, settings: CardSettings, place: Place) -> bytes:
    """The content of README.md.

    Args:
        place: where readers will find the release.
    """
    run = contents.run
    origin = run.origin
    base_model = settings.base_model or origin.repository
    stated = License(id=settings.license) if settings.license else origin.license
    text = render(
        "model_card.md.jinja",
        front_matter=_front_matter(contents, base_model, stated),
        contents=contents,
        run=run,
        base_model=base_model,
        stated=stated,
        legal_files=[name for name in origin.legal_files if name in contents.files],
        sizes=_sizes(contents),
        evaluations=[(o, quality_rows(o), measured_on(o)) for o in run.evaluations],
        experts_in_float=any(key.startswith(CODES_PREFIX) for key in run.manifest.files),
        rounds_inputs=contents.export is not None and _rounds_inputs(run),
        in_float=list(left_in_float(run)),
        notes=[_without_source(run, note) for note in (run.plan.notes if run.plan else ())],
        recipe=block(yaml_text(published_recipe(run)), "yaml"),
        facts=facts_of(contents),
        commands=[(one, block(one.text, one.language)) for one in load_commands(contents, place)],
        place=place,
        code=code,
    )
    return text.encode()


def _front_matter(contents: Contents, base_model: str, stated: License) -> Markdown:
    """What the hub reads: nothing that is not known."""
    origin = contents.run.origin
    link = stated.link
    if stated.id == "other" and not link and stated.said_by in contents.files:
        link = stated.said_by
    values: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else "",
        "license": stated.id,
        "license_name": stated.name if stated.id == "other" else "",
        "license_link": link,
        "language": list(origin.languages),
        "datasets": list(origin.datasets),
        "library_name": _LIBRARIES.get(contents.form, "transformers"),
        "pipeline_tag": _pipeline_tag(contents),
        "tags": _tags(contents),
        "quantized_by": "quantfleet",
    }
    return Markdown(yaml_text({key: value for key, value in values.items() if value}))


def _rounds_inputs(run: FinishedRun) -> bool:
    formats = (code_format(layer.scheme) for layer in run.layers if layer.scheme is not None)
    return any(one is not None and one.activations != "float" for one in formats)


def _pipeline_tag(contents: Contents) -> str:
    """The hub's name of what the release itself can do; "" where it has none."""
    stated = contents.run.origin.pipeline_tag
    if contents.run.plan is None:
        return ""
    task = contents.run.plan.task
    if task.endswith("CausalLM"):
        return stated or "text-generation"
    # A classifier's head, for example, does not come along.
    if task.endswith("TextEmbedder") or contents.export is not None:
        return stated if stated in _FOR_VECTORS else _FOR_VECTORS[0]
    return ""


def _tags(contents: Contents) -> list[str]:
    found: dict[str, None] = {"quantfleet": None}
    schemes = [layer.scheme for layer in contents.run.layers if layer.scheme is not None]
    for scheme in schemes:
        found |= dict.fromkeys((scheme.mode, f"{_bits(scheme)}-bit"))
    if contents.form == "compressed-tensors":
        found[contents.form] = None
    return list(found)


def _bits(scheme: Scheme) -> int:
    return getattr(scheme, "weight_bits", None) or (4 if scheme.mode in ("awq", "int4") else 8)


def _sizes(contents: Contents) -> list[tuple[str, str]]:
    run = contents.run
    rows = [("source", size(run.source_bytes)), ("stored", size(contents.stored_bytes))]
    if contents.export is None and run.loaded_bytes is not None:
        rows.append(("in memory, loaded by stock KerasHub", size(run.loaded_bytes)))
    return rows


def left_in_float(run: FinishedRun) -> Iterator[tuple[int, str, str]]:
    """Number of layers left in float, one of them, and why; the recipe says so where "" is why."""
    left = [layer for layer in run.layers if layer.scheme is None]
    counts = Counter(_without_source(run, layer.note) for layer in left)
    for reason, number in counts.most_common(_MOST_REASONS):
        first = next(x.path for x in left if _without_source(run, x.note) == reason)
        yield number, first, reason.removesuffix("; left in float")


def _without_source(run: FinishedRun, text: str) -> str:
    """A note without the path of the source."""
    for url in (run.source_url, run.source_url.removeprefix("file://")):
        text = text.replace(url, run.origin.name) if url else text
    return text


def published_recipe(run: FinishedRun) -> dict[str, Any]:
    """A run's recipe, with the names of its texts in place of where they lie."""
    values = run.recipe.to_dict()
    calibration = values.get("calibration")
    if calibration:
        calibration["texts"] = [
            _published(text) if isinstance(text, str) else text | {"url": _published(text["url"])}
            for text in calibration["texts"]
        ]
        if "inputs" in calibration:
            inputs: Mapping[str, str] = calibration["inputs"]
            calibration["inputs"] = {name: _published(url) for name, url in inputs.items()}
    return values


def _published(url: str) -> str:
    if (on_hub := _HUB_TEXTS.fullmatch(url)) is not None:
        return on_hub[1]
    # Neither a query nor a user's name and password.
    return re.sub(r"[?#].*", "", url).rstrip("/").rpartition("/")[2].rpartition("@")[2]


def facts_of(contents: Contents) -> list[tuple[str, str]]:
    """Digests and circumstances by which a result can be told from others, and made again."""
    run = contents.run
    given = run.manifest.provenance
    rows = [(f"SHA-256 of the run's {run.manifest.key}", run.manifest.record_sha256)]
    if contents.export is not None:
        rows.append((f"SHA-256 of {contents.digest_of}", contents.digest))
    rows.append(("plan", run.manifest.plan_digest))
    for label, key in (("source", "source_digest"), ("source file", "source_sha256")):
        if key in given:
            rows.append((label, given[key]))
    for origin in given.get("composed", ()):
        for what in ("parts", "layers"):
            if origin.get(what):
                given_by = ", ".join(map(str, origin[what]))
                rows.append((f"{what} of the run {origin['recipe']}", given_by))
        rows.append(("SHA-256 of its manifest.json", origin["manifest_sha256"]))
    calibration = given.get("calibration") or {}
    for label, key in (
        ("calibration texts", "texts_sha256"),
        ("calibration windows", "tokens_sha256"),
        ("number of windows", "num_samples"),
        ("tokens in each", "sequence_length"),
    ):
        if key in calibration:
            rows.append((label, str(calibration[key])))
    for label, values in (("made on", given["machine"]), ("versions", given["versions"])):
        rows.append((label, ", ".join(f"{key} {value}" for key, value in sorted(values.items()))))
    return rows
