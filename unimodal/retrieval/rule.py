"""The rule by which a model ranks: what a checkpoint's configuration says, and what a call asks for in its place."""

from dataclasses import replace

from unimodal.config import Combine, ModelConfig, ScoringRule


def rule_for(
    config: ModelConfig, *, k: int | None = None, combine: Combine | None = None, scale: float | None = None
) -> ScoringRule:
    """The rule of a model, with what is asked for in its place. A model without a matching head scores nothing again: its k is 0.

    Args:
        config: of the model; `config.scoring` is its rule.
        k, combine, scale: of `ScoringRule`; None leaves what the model's rule says.

    Raises:
        ValueError: the rule is one that the model cannot follow.
    """
    asked = {"k": k, "combine": combine, "scale": scale}
    rule = replace(config.scoring, **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]
    if rule.directions != "both":
        raise ValueError(
            f"scoring.directions is {rule.directions!r}, but this model scores texts for an image as well as images for a text; set "
            "scoring.directions to 'both'"
        )
    if config.matching is not None:
        return rule
    if rule.first == "pair":
        raise ValueError(
            "scoring.first is 'pair', which scores every pair by the matching head, and this model has none; open it with its matching "
            "head, train one, or set scoring.first to 'embed'"
        )
    if k:
        raise ValueError(
            f"{k} candidates are to be scored again, but this model has no matching head that could; leave the depth out, or give 0"
        )
    return replace(rule, k=0)
