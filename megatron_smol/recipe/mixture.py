"""A stage's mixture: named sources and groups of them, resolved to exact fractions that sum to one.

Used by `schema` while a recipe is read. `web: {weight: 0.9, of: {fineweb_edu: 0.6, dclm: 0.4}}` is a group:
its weight is shared out by the inner weights, which sum to one themselves; groups nest, and a source named
twice adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from megatron_smol.data.blend import SUM_TOLERANCE, exact_weights


def resolve_mixture(raw: object) -> dict[str, Fraction]:
    """The mixture as source -> exact weight; sources of weight 0 are left out."""
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(
            "a mixture must name at least one source with its weight, such as {web: 0.9, code: 0.1}"
        )
    flat: dict[str, Fraction] = {}
    _flatten(raw, Fraction(1), "", flat)
    used = {name: weight for name, weight in flat.items() if weight > 0}
    if not used:
        raise ValueError("every weight of the mixture is 0; give at least one source a weight above 0")
    return exact_weights(used)


def mixture_text(weights: Mapping[str, Fraction]) -> dict[str, float | str]:
    """Weights for a YAML file: a decimal where that is exact, else "p/q", so that they load back equal."""
    return {name: float(w) if Fraction(repr(float(w))) == w else str(w) for name, w in weights.items()}


def _flatten(raw: Mapping[object, object], share: Fraction, path: str, flat: dict[str, Fraction]) -> None:
    """Add `share` of every source in `raw` to `flat`, after checking that this level sums to one."""
    level: dict[str, Fraction] = {}
    for key, value in raw.items():
        name, where = str(key), f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            if set(value) != {"weight", "of"} or not isinstance(value["of"], Mapping):
                raise ValueError(f"group '{where}' must look like {{weight: 0.9, of: {{a: 0.6, b: 0.4}}}}")
            level[name] = _number(value["weight"], where)
        else:
            level[name] = _number(value, where)
    total = sum(level.values(), Fraction(0))
    if abs(total - 1) > SUM_TOLERANCE:
        terms = " + ".join(f"{name} {float(weight):g}" for name, weight in level.items())
        what = f"the weights of group '{path}'" if path else "the weights"
        raise ValueError(f"{what} sum to {float(total):.8g}, not 1 ({terms})")
    for key, value in raw.items():
        part = share * level[str(key)] / total
        if isinstance(value, Mapping):
            _flatten(value["of"], part, f"{path}.{key}" if path else str(key), flat)
        else:
            flat[str(key)] = flat.get(str(key), Fraction(0)) + part


def _number(value: object, where: str) -> Fraction:
    """A weight as the exact decimal that was written."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
            raise ValueError
        weight = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"the weight of '{where}' is {value!r}; a weight is a number from 0 to 1") from None
    if not 0 <= weight <= 1 + SUM_TOLERANCE:
        raise ValueError(f"the weight of '{where}' is {value}; a weight is a number from 0 to 1")
    return weight
