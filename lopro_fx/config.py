"""One frozen dataclass a method. A bad value is refused on construction, with the value and the allowed range."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lopro_fx.errors import ConfigError

GROUP_SIZES = (32, 64, 128, -1)
BITS = (2, 3, 4, 8)
HEAD_BITS = (0, 4, 8)
FACTOR_BITS = (8, 16)
TRANSFORMS = ("identity", "act_order", "partial", "full")
IMPORTANCE = ("none", "gradient")
LOW_RANK = ("block_svd", "r1_sketch")


def _choice(config: object, name: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    # 3.0 and True are equal to whole numbers, and no widths.
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): allowed are {', '.join(map(str, allowed))}")


def _at_least(config: object, name: str, low: float, high: float = float("inf")) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be a number in [{low:g}, {high:g}]")


def _whole(config: object, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be a whole number in [{low}, {high}]")


def _flag(config: object, name: str) -> None:
    value = getattr(config, name)
    if type(value) is not bool:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be True or False")


def _patterns(config: object, name: str) -> None:
    """Make a tuple of the patterns, of which one may stand alone."""
    value = getattr(config, name)
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list, set, frozenset)) or not all(isinstance(item, str) for item in patterns):
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be names or patterns, as strings")
    object.__setattr__(config, name, tuple(patterns))


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method shares.

    Args:
        bits: width of a weight's code: 2, 3, 4 or 8.
        group_size: input columns that share a scale and a zero: 32, 64, 128, or -1 for the whole row.
        include: fnmatch patterns on a Linear's fully qualified name. What is kept by default (the output projection,
            routers of experts, Linears of one output feature) is taken only where one of them is its whole name, which
            no pattern with a wildcard is.
        exclude: patterns of Linears to leave alone; they win over `include` and `head_bits`.
        head_bits: width of a code of the output projection, rounded to nearest without data, rotation or factors, and
            of an embedding that shares its weight: 4 or 8; 0 leaves both. An output projection that `include` names is
            solved as the other Linears are, and its embedding kept.
        clip_steps: clipping ranges tried for each group by squared error; 0 keeps min and max.
        token_clip: tokens whose squared norm exceeds this many times the median are scaled down to it in the Gram; 0
            takes them as they are.
        importance: "gradient" weighs tokens in the Gram by the size of the loss's gradient at the outputs of a group,
            for one more forward and a backward run of the calibration batches, in a program that returns logits; "none"
            counts them the same.
        sequential: solve each group on inputs that come from the layers quantised before it; False uses the
            unquantised model's inputs throughout.
        seed: of every random choice (signs, sketches).
    """

    bits: int = 3
    group_size: int = 64
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    head_bits: int = 0
    clip_steps: int = 24
    token_clip: float = 16.0
    importance: str = "none"
    sequential: bool = True
    seed: int = 0
    method: ClassVar[str]

    def __post_init__(self) -> None:
        _patterns(self, "include")
        _patterns(self, "exclude")
        _choice(self, "bits", BITS)
        _choice(self, "head_bits", HEAD_BITS)
        _choice(self, "group_size", GROUP_SIZES)
        _whole(self, "clip_steps", 0, 1000)
        _at_least(self, "token_clip", 0)
        _choice(self, "importance", IMPORTANCE)
        _whole(self, "seed", 0, 2**63 - 1)
        _flag(self, "sequential")

    def to_dict(self) -> dict[str, Any]:
        """Fields and the method's name, ready for JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"method": self.method, **values}


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Rounding to nearest. Needs no calibration; with one, it is only used to report errors."""

    method: ClassVar[str] = "rtn"


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """Rounding with error feedback (Frantar et al., 2210.17323).

    Args:
        damp: part of the Gram's mean diagonal added to its diagonal; raised tenfold until a factorisation exists.
        act_order: round columns in order of falling activation energy. "column" also stores them in that order, with a
            permutation that gathers the activation; "static" fits every grid before rounding and needs none; "group"
            ranks whole groups and needs none; "none" keeps storage order.
        token_clip: off by default, as in the original method.
    """

    damp: float = 0.01
    act_order: str = "static"
    token_clip: float = 0.0
    method: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "damp", 0, 10)
        _choice(self, "act_order", ("none", "group", "static", "column"))


@dataclass(frozen=True, kw_only=True)
class LoPRo(Method):
    """Permuted block-wise rotation with a low-rank branch (arXiv 2601.19675).

    Args:
        rank: components of the low-rank branch; 0 leaves it out.
        factor_bits: 8 (int8, one fp16 scale a component) or 16 (fp16).
        transforms: candidates among "identity" (no permutation, no rotation), "act_order" (columns by energy, not
            rotated), "partial" (permuted by importance, the salient block not rotated) and "full" (random signs, every
            column rotated). With several, each group keeps the one of least proxy loss; "full" alone measured better
            than that guard, whose loss on the calibration text misjudges "partial" (see benchmarks/results).
        block_size: largest Hadamard block; the block used is the largest power of two that divides the width.
        salient: columns that "partial" leaves alone (the paper's b_I).
        signs: random signs before the Hadamard blocks of "partial".
        low_rank: "block_svd" (randomised subspace iteration) or "r1_sketch" (the paper's rank-one deflation).
        power_iterations: of the sketch, each two passes over the matrix.
        refits: times the factors are solved again for the rounding error and the weights rounded again around them;
            the best iterate is kept. 0 is the paper: factors once, from the weights alone.
        sweeps: coordinate-descent passes over the codes, each with a fit of the scales, after each rounding.
        damp: as in GPTQ.
    """

    rank: int = 16
    factor_bits: int = 8
    transforms: tuple[str, ...] = ("full",)
    block_size: int = 256
    salient: int = 64
    signs: bool = True
    low_rank: str = "block_svd"
    power_iterations: int = 2
    refits: int = 2
    sweeps: int = 2
    damp: float = 0.01
    method: ClassVar[str] = "lopro"

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.transforms
        object.__setattr__(self, "transforms", (value,) if isinstance(value, str) else tuple(value))
        if not self.transforms:
            raise ConfigError(f"LoPRo(transforms=()): name at least one of {', '.join(TRANSFORMS)}")
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise ConfigError(
                    f"LoPRo(transforms={self.transforms!r}): {name!r} is not one of {', '.join(TRANSFORMS)}"
                )
        _whole(self, "rank", 0, 4096)
        _choice(self, "factor_bits", FACTOR_BITS)
        _choice(self, "block_size", tuple(1 << i for i in range(11)))
        _whole(self, "salient", 0, 1 << 20)
        _flag(self, "signs")
        _choice(self, "low_rank", LOW_RANK)
        _whole(self, "power_iterations", 0, 64)
        _whole(self, "refits", 0, 32)
        _whole(self, "sweeps", 0, 32)
        _at_least(self, "damp", 0, 10)

    @classmethod
    def paper(cls, **changes: Any) -> LoPRo:
        """The paper's choices: partial rotation of 256-wide blocks after 256 salient columns without signs, R1-sketch
        factors from the scaled weights, no refit, groups of 128."""
        choices: dict[str, Any] = {
            "group_size": 128,
            "transforms": ("partial",),
            "salient": 256,
            "signs": False,
            "low_rank": "r1_sketch",
            "power_iterations": 8,
            "refits": 0,
            "sweeps": 0,
            "clip_steps": 90,
            "token_clip": 0,
        }
        return cls(**{**choices, **changes})


METHODS: dict[str, type[Method]] = {cls.method: cls for cls in (RTN, GPTQ, LoPRo)}


def from_dict(values: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`."""
    values = dict(values)
    name = values.pop("method", None)
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: known are {', '.join(METHODS)}")
    try:
        return METHODS[name](**values)
    except TypeError as error:
        raise ConfigError(f"{METHODS[name].__name__}: {error}") from error
