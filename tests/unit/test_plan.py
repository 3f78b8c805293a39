"""A plan is plain JSON, the same bytes for the same plan, and needs no framework to be read."""

import dataclasses
import json

import numpy as np
import pytest

import clipcore as cc

PART = cc.Part(
    role="kernel",
    source_layer="fc",
    target_layer="fc",
    terms=(cc.Term("fc.weight"),),
    pattern="out (channel spatial) -> (spatial channel) out",
    sizes={"channel": 3},
    evidence="proven",
    reason="same input and same output",
)
ROW = cc.Row("fc/kernel", (PART,))
GATES = cc.Row(
    "gru/bias",
    tuple(
        cc.Part(
            f"bias.{gate}",
            "rnn.l0",
            "gru",
            (cc.Term("rnn.bias_ih_l0", ((start, start + 2),)), cc.Term("rnn.bias_hh_l0", ((start, start + 2),))),
            "unit -> unit",
            {},
            "proven",
            "same input and same output",
            operation="sum",
            into=((2 - start, 4 - start),),
        )
        for gate, start in (("reset", 0), ("update", 2))
    ),
)
DIFFERENCES = (
    cc.Difference("bn", "eps", 1e-5, 1e-3, "mend it"),
    cc.Difference("conv", "padding", ((1, 1), (1, 1)), "same"),
    cc.Difference("fc", "input", "another", "another", "what comes before it differs"),
)
PLAN = cc.Plan("torch", "tensorflow", (ROW, GATES), ("head.weight",), DIFFERENCES)


def test_a_saved_plan_is_read_back_equal_and_saved_again_to_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    PLAN.save(first)
    loaded = cc.Plan.load(first)
    assert loaded == PLAN
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_row_carries_a_flattened_kernel_by_hand():
    kernel = np.arange(12.0).reshape(2, 6)  # out = 2, in = (channel 3, spatial 2)
    carried = ROW.carry({"fc.weight": kernel})
    expected = [[0, 6], [2, 8], [4, 10], [1, 7], [3, 9], [5, 11]]
    np.testing.assert_array_equal(carried, expected)
    held = {"fc.weight": np.zeros_like(kernel)}
    PART.put_back(carried, held)
    np.testing.assert_array_equal(held["fc.weight"], kernel)


def test_a_row_of_parts_puts_each_where_it_belongs_by_hand():
    biases = {"rnn.bias_ih_l0": np.array([1.0, 2.0, 3.0, 4.0]), "rnn.bias_hh_l0": np.array([10.0, 20.0, 30.0, 40.0])}
    assert GATES.carry(biases).tolist() == [33.0, 44.0, 11.0, 22.0]
    assert (GATES.role, GATES.sources) == ("bias", tuple(biases))
    assert not GATES.reversible
    assert ROW.reversible


def test_a_row_is_as_strong_as_its_weakest_part():
    first, second = GATES.parts
    assert GATES.evidence == "proven"
    assert cc.Row("gru/bias", (first, dataclasses.replace(second, evidence="name"))).evidence == "name"


def test_a_layer_is_explained_by_any_of_its_names():
    for name in ("rnn.l0", "gru", "gru/bias", "rnn.bias_hh_l0"):
        text = PLAN.explain(name)
        assert "gru <- rnn.l0" in text
        assert "bias.reset: gru/bias[2:4] = rnn.bias_ih_l0[0:2] + rnn.bias_hh_l0[0:2]" in text
        assert "one way" in text
    assert "one way" not in PLAN.explain("fc")
    assert "channel=3" in PLAN.explain("fc/kernel")


def test_a_name_that_the_plan_does_not_know_is_refused_with_those_near_it():
    with pytest.raises(cc.MappingError, match=r"'fc/kernle'.*'fc/kernel'"):
        PLAN.explain("fc/kernle")


def test_a_tensor_of_another_shape_is_refused_with_its_shape_and_the_pattern():
    with pytest.raises(cc.MappingError, match=r"\(2, 5\).*\(channel spatial\)"):
        ROW.carry({"fc.weight": np.zeros((2, 5))})
    with pytest.raises(cc.MappingError, match=r"fc\.weight"):
        ROW.carry({})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 3}', '{"schema": 3, "rows": [{}]}'])
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(cc.MappingError, match=r"plan\.json"):
        cc.Plan.load(path)


@pytest.mark.parametrize("place", ["row", "part"])
def test_an_unknown_entry_is_refused(tmp_path, place):
    document = PLAN.to_dict()
    {"row": document["rows"][0], "part": document["rows"][0]["parts"][0]}[place]["extra"] = 1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(cc.MappingError, match="extra"):
        cc.Plan.load(path)


def test_the_printed_plan_names_every_tensor_its_origin_and_its_evidence():
    text = str(PLAN)
    for part in ("fc/kernel", "fc.weight", "proven", "head.weight", "eps"):
        assert part in text


TEXTS = ("role", "source_layer", "target_layer", "pattern", "reason", "operation", "then")
TERM = {"name": "fc.weight", "within": [], "pattern": ""}


@pytest.mark.parametrize(
    "edit",
    [
        {"terms": []},
        {"terms": [], "fill": float("nan")},
        {"terms": [TERM, TERM]},
        {"terms": "fc.weight"},
        {"terms": [{**TERM, "within": [[1]]}]},
        {"terms": [{**TERM, "name": 3}]},
        {"operation": "no such operation"},
        {"numbers": [1]},
        {"into": 3},
        {"pattern": "banana"},
        {"pattern": 3},
        {"sizes": [1]},
        {"evidence": "banana"},
        {"terms": [], "fill": 10**400},
        *({name: value} for name in TEXTS for value in (None, 1, ["x"], {"group": 1}, True)),
    ],
)
def test_an_edited_row_that_means_nothing_is_refused(tmp_path, edit):
    document = PLAN.to_dict()
    document["rows"][0]["parts"][0].update(edit)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(cc.MappingError, match=r"plan\.json"):
        cc.Plan.load(path)


@pytest.mark.parametrize(
    "edit",
    [
        *({name: value} for name in ("source", "target") for value in (None, 1, ["x"])),
        *({"unused": value} for value in ("x", {}, [1], [None])),
        *({"rows": value} for value in ("x", {}, [1], None)),
        *({"differences": value} for value in ("x", {}, [1], [{}], None)),
        {"differences": [{"layer": 1, "setting": "eps", "source": 1, "target": 2}]},
        {"differences": [{"layer": "bn", "setting": "eps", "source": 1, "target": 2, "repair": 3}]},
    ],
)
def test_an_edited_plan_that_means_nothing_is_refused(tmp_path, edit):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN.to_dict(), **edit}))
    with pytest.raises(cc.MappingError, match=r"plan\.json is no whole plan"):
        cc.Plan.load(path)


def test_a_plan_that_cannot_be_saved_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "plan.json"
    folder.mkdir()
    with pytest.raises(cc.InvalidInput, match=r"cannot be written to .*plan\.json"):
        PLAN.save(folder)
    with pytest.raises(cc.InvalidInput, match="in a folder that is there"):
        PLAN.save(folder / "none" / "plan.json")
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_difference_that_no_value_tells_is_said_without_values():
    assert str(DIFFERENCES[2]) == "fc: input: not the same; what comes before it differs"


def test_a_plan_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(cc.MappingError, match="nowhere"):
        cc.Plan.load(tmp_path / "nowhere.json")
