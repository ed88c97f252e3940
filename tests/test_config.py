"""Configurations survive JSON, and whatever is wrong in one is refused with its place, what came and what is known."""

import json
import math

import pytest
from toy import toy_config

from unimodal.config import BackboneConfig, MatchingConfig, ModelConfig, from_dict, to_dict


@pytest.mark.parametrize("overrides", [{}, {"matching": None, "generation": None}, {"matching": {"kind": "bridge"}}])
def test_round_trip_through_json(overrides: dict) -> None:
    config = toy_config(**overrides)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_need_nothing() -> None:
    assert from_dict(ModelConfig, {}) == ModelConfig()


def test_built_parts_are_taken_as_they_are() -> None:
    part = MatchingConfig(layers=7)
    assert from_dict(ModelConfig, {"matching": part}).matching is part


def test_whole_numbers_serve_as_floats() -> None:
    dropout = from_dict(MatchingConfig, {"dropout": 0}).dropout
    assert isinstance(dropout, float)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"machting": {}}, ValueError, ["ModelConfig: unknown key 'machting'", "did you mean 'matching'", "backbone"]),
        (
            {"backbone": {"vision": {"image_sise": 32}}},
            ValueError,
            ["ModelConfig.backbone.vision: unknown key 'image_sise'", "did you mean 'image_size'"],
        ),
        ({"zzzz": 1}, ValueError, ["unknown key 'zzzz'; known: "]),
        ({"bridge": {"layers": "six"}}, TypeError, ["ModelConfig.bridge.layers: expected int, got str 'six'"]),
        ({"bridge": {"layers": True}}, TypeError, ["ModelConfig.bridge.layers: expected int, got bool True"]),
        ({"bridge": {"layers": None}}, TypeError, ["ModelConfig.bridge.layers: expected int, got NoneType"]),
        ({"bridge": {"queries": {"image": 1.5}}}, TypeError, ["ModelConfig.bridge.queries.image: expected int"]),
        ({"bridge": {"queries": [4]}}, TypeError, ["ModelConfig.bridge.queries: expected a mapping, got list"]),
        ({"bridge": 6}, TypeError, ["ModelConfig.bridge: expected a mapping of settings, got int 6"]),
        (
            {"embedding": {"pool": "max"}},
            ValueError,
            ["ModelConfig.embedding.pool: expected one of 'query', 'mean', 'attention', got 'max'"],
        ),
        (
            {"embedding": {"matryoshka": "64"}},
            TypeError,
            ["ModelConfig.embedding.matryoshka: expected a list, got str"],
        ),
        ({"embedding": {"matryoshka": [64, "32"]}}, TypeError, ["ModelConfig.embedding.matryoshka[1]: expected int"]),
        ({"backbone": {"vision": {"mean": [0.5]}}}, ValueError, ["vision.mean: expected 3 values, got 1"]),
        ([], TypeError, ["ModelConfig: expected a mapping of settings, got list []"]),
        ({"bridge": {"layers": 0}}, ValueError, ["bridge.layers: expected a whole number of at least 1", "got 0"]),
        ({"bridge": {"width": -384}}, ValueError, ["bridge.width: expected a whole number of at least 1", "got -384"]),
        ({"bridge": {"heads": 10**30}}, ValueError, ["bridge.heads: expected a whole number", "of up to 64 bits"]),
        ({"bridge": {"queries": {"image": 0}}}, ValueError, ["bridge.queries.image: expected a whole number"]),
        ({"captioning": {"bos_id": -1}}, ValueError, ["captioning.bos_id: expected a whole number of at least 0"]),
        ({"scoring": {"scale": math.nan}}, ValueError, ["scoring.scale: expected a finite number, got nan"]),
        ({"scoring": {"k": -1}}, ValueError, ["scoring.k: expected a whole number of at least 0"]),
        ({"scoring": {"first": "late"}}, ValueError, ["scoring.first: expected one of 'embed', 'pair', got 'late'"]),
        ({"scoring": {"first": "pair", "combine": "sum"}}, ValueError, ["have no score to add to; set combine to"]),
        ({"embedding": {"scale": math.inf}}, ValueError, ["embedding.scale: expected a finite number, got inf"]),
        ({"embedding": {"scale": True}}, TypeError, ["embedding.scale: expected float, got bool True"]),
        ({"embedding": {"scale": 10**400}}, TypeError, ["embedding.scale: expected float, got int"]),
        ({"backbone": {"vision": {"std": [1, math.nan, 1]}}}, ValueError, ["vision.std[1]: expected a finite number"]),
        (
            {"backbone": {"text": {"kwargs": {"rope": [{"eps": -math.inf}]}}}},
            ValueError,
            ["text.kwargs.rope[0].eps: expected a finite number, got -inf"],
        ),
    ],
)
def test_errors_say_where_what_and_what_is_known(values: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        from_dict(ModelConfig, values)
    for word in words:
        assert word in str(caught.value)


def test_place_can_be_named() -> None:
    with pytest.raises(ValueError, match="recipe.yaml: unknown key 'widht'; did you mean 'width'"):
        from_dict(BackboneConfig, {"widht": 8}, "recipe.yaml")
