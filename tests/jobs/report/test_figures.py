from __future__ import annotations

from typing import Any

from jobs.report.figures import error_figures, sizes_figure
from jobs.report.layer_errors import LayerError, remarks, worst


def layer(block: int | None, name: str, error: float | None, **values: Any) -> LayerError:
    given: dict[str, Any] = {"rounded_output_error": 4.0, "weight_error": 0.1, "account": {}}
    return LayerError(
        block=block,
        name=name,
        path=f"{block}/{name}",
        scheme="gptq/4/64",
        output_error=error,
        **given | values,
    )


def test_an_error_map_has_a_place_for_each_layer_of_each_block() -> None:
    layers = [
        layer(block, name, 1.0 + block) for block in range(3) for name in ("query", "key")
    ] + [layer(None, "head", 9.0), layer(0, "table", None)]
    share, error = error_figures(layers)
    for figure in (share, error):
        values = figure.spec["data"]["values"]
        assert [(v["block"], v["layer"]) for v in values] == [
            (block, name) for block in range(3) for name in ("query", "key")
        ]
        assert [v["row"] for v in values] == [0, 1] * 3
    assert [v["share"] for v in share.spec["data"]["values"]][::2] == [0.25, 0.5, 0.75]


def test_a_layer_without_error_has_no_colour_on_a_logarithmic_scale() -> None:
    _, error = error_figures([layer(0, "query", 0.0), layer(1, "query", 2.0)])
    assert [v["error"] for v in error.spec["data"]["values"]] == [None, 2.0]


def test_no_map_is_drawn_where_nothing_was_calibrated() -> None:
    assert error_figures([layer(0, "query", None), layer(None, "head", 1.0)]) == ()


def test_the_worst_come_first_and_weights_count_only_without_outputs() -> None:
    given = [
        layer(0, "a", 1.0),
        layer(0, "b", None, weight_error=50.0),
        layer(0, "c", 3.0),
        layer(0, "d", 3.0),
    ]
    assert [one.name for one in worst(given, 3)] == ["c", "d", "a"]


def test_sizes_are_stacked_in_the_order_given() -> None:
    rows = [("source", "blocks", 3 << 20), ("source", "rest", 1 << 20), ("stored", "blocks", 512)]
    values = sizes_figure(rows).spec["data"]["values"]
    assert [v["row"] for v in values] == [0, 1, 2]
    assert [v["size"] for v in values] == ["3.0 MiB", "1.0 MiB", "512 B"]


def test_remarks_name_what_went_otherwise_than_the_recipe_asks() -> None:
    as_asked = layer(0, "a", 1.0, damping=0.01, account={"damping": 0.01, "kept": "gptq"})
    assert remarks([as_asked, layer(0, "b", None, account={"kept": "rtn"})]) == []
    found = remarks(
        [
            layer(0, "c", 1.0, damping=0.01, account={"damping": 0.1, "dead_inputs": 3}),
            layer(1, "c", 1.0, damping=0.01, account={"damping": 1.0, "dead_inputs": 4}),
            layer(2, "d", 1.0, damping=0.01, account={"damping": 0.01, "kept": "rtn"}),
        ]
    )
    assert [one.partition(" more ")[0].partition(" round")[0] for one in found] == [
        "2 layers, such as 0/c, have",
        "2/d has",
        "2 layers, such as 0/c, have inputs that calibration never showed, 7 in all, whose weights "
        "were",
    ]
    assert "up to 1," in found[0]
