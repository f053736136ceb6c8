"""Which cells the study has, and what each one needs.

Not everything is crossed with everything; a crossing is there where a claim of the study needs it:

- RL from each mid-trained model and from the base takes the study's prompts (filtered by the model that was mid-trained
  on maths, code and science) and, as the fair way, those filtered by the model itself. For `mcs` the two are one.
- The gate matters where a model does not write the required form: with and without it from the base (under both
  filters) and from `mcs`. Every mid-trained model learned the form from its documents, so one of them is enough.
- That the RL mixture does not matter is a claim about `mc` and `mcs` (table 11): both get prompts with science and
  without.
- Reward controls start from `mcs`, where the real reward is seen to work. The random reward also starts from the base:
  without it "the same change from any start" has no null. `x10` is the control of the claim on weights.
- `mcs-longer` is mid-trained on for as long as RL takes: what the time would have bought without RL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_nemo.errors import InputError
from prism_nemo.study.settings import FAMILIES

MIXTURES = {
    "math": ("arithmetic",),
    "mc": ("arithmetic", "lists"),
    "mcs": ("arithmetic", "lists", "formulas"),
    "noret": ("arithmetic", "lists", "formulas"),
}
STUDY_FILTER = "mcs"
FIRST_SEED = 1


@dataclass(frozen=True)
class Cell:
    """One thing to do for one family and seed.

    Attributes:
        family: Of the model.
        seed: Of data, weights, batches and sampling.
        name: Unique within family and seed; also its folder.
        kind: base, midtrain, filter, rl or updates.
        parent: Name of the cell whose model this one starts from or asks; empty for none.
        needs: Names of all cells that must be done before.
        mixture: Of mid-training.
        other_seed: Whether batches come in another order than the seed's own.
        rl_rate: Mid-training at RL's learning rate.
        longer: More mid-training, from the mid-trained model.
        prompts: Of RL: the mid-trained model (or base) that filtered them.
        domains: Tasks that RL takes prompts from.
        gate: think or none.
        control: What replaces the reward, or none.
        factor: Of the learning rate.
    """

    family: str
    seed: int
    name: str
    kind: str
    parent: str = ""
    needs: tuple[str, ...] = ()
    mixture: str = ""
    other_seed: bool = False
    rl_rate: bool = False
    longer: bool = False
    prompts: str = ""
    domains: tuple[str, ...] = MIXTURES["mcs"]
    gate: str = "think"
    control: str = "none"
    factor: float = 1.0

    @property
    def key(self) -> str:
        """Place in the folders of results: family/seed/name."""
        return f"{self.family}/{self.seed}/{self.name}"

    @property
    def has_model(self) -> bool:
        """Whether a model comes out of it."""
        return self.kind in ("base", "midtrain", "rl")


def _rl(family: str, seed: int, start: str, suffix: str, **what: object) -> Cell:
    prompts = str(what.pop("prompts", STUDY_FILTER))
    needs = (start, f"prompts-{prompts}")
    name = f"rl-{start}-{suffix}"
    return Cell(family, seed, name, "rl", start, needs, prompts=prompts, **what)  # type: ignore[arg-type]


def _group(family: str, seed: int) -> list[Cell]:
    cells = [Cell(family, seed, "base", "base", mixture="base")]
    for name in MIXTURES:
        cells.append(Cell(family, seed, name, "midtrain", "base", ("base",), mixture=name))
    again = Cell(family, seed, "mcs-again", "midtrain", "base", ("base",), mixture="mcs", other_seed=True)
    slow = Cell(family, seed, "mcs-rl-rate", "midtrain", "base", ("base",), mixture="mcs", rl_rate=True)
    longer = Cell(family, seed, "mcs-longer", "midtrain", "mcs", ("mcs",), mixture="mcs", longer=True)
    cells += [again, slow, longer]
    cells += [Cell(family, seed, f"prompts-{of}", "filter", of, (of,)) for of in ("mcs", "base", "math", "mc", "noret")]
    without = MIXTURES["mc"]
    rl = [
        _rl(family, seed, "base", "study-think"),
        _rl(family, seed, "base", "study-free", gate="none"),
        _rl(family, seed, "base", "own-think", prompts="base"),
        _rl(family, seed, "base", "own-free", prompts="base", gate="none"),
        _rl(family, seed, "mcs", "study-think"),
        _rl(family, seed, "mcs", "study-free", gate="none"),
    ]
    for start in ("math", "mc", "noret"):
        rl += [_rl(family, seed, start, "study-think"), _rl(family, seed, start, "own-think", prompts=start)]
    rl += [_rl(family, seed, start, "no-science", domains=without) for start in ("mc", "mcs")]
    rl += [_rl(family, seed, "mcs", control, control=control) for control in ("random", "shuffled", "format_only")]
    rl += [_rl(family, seed, "mcs", "x10", factor=10.0), _rl(family, seed, "base", "random", control="random")]
    cells += rl
    compared = tuple(c.name for c in cells if c.kind != "filter" and not c.longer)
    cells.append(Cell(family, seed, "updates", "updates", "", compared))
    return cells


def plan(families: Sequence[str] = FAMILIES, seeds: int = 3) -> list[Cell]:
    """All cells, depth first: one family and seed after the other, so that few models are needed at any time.

    Raises:
        InputError: For an unknown family, one named twice, or no seed.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families or len(set(families)) != len(families):
        told = f"'{unknown[0]}' is unknown" if unknown else "name each family once, and at least one"
        raise InputError(f"--families: {told}; choose from {', '.join(FAMILIES)}")
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: must be at least 1")
    # Seed outermost: a study that is cut short has whole families rather than one family with all its seeds.
    return [cell for n in range(seeds) for family in families for cell in _group(family, FIRST_SEED + n)]
