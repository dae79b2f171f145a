"""`ReALLMConfig`: what ``from_pretrained(..., quantization_config=...)`` takes, and what config.json keeps."""

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_ext.kernels.trellis import MAX_WIDTH
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import Effort

if TYPE_CHECKING:
    from hf_ext.quant.linear import ReALLMLinear

METHOD = "reallm"
FORMAT_VERSION = 3
READABLE = (1, 2, 3)  # format 1 has no trellis, format 2 no outliers

# windows of calibration, rounds and k-means iterations of the solver, bits that a value of a trellis depends on
PRESETS: dict[str, dict[str, int]] = {
    "fast": {"windows": 16, "rounds": 1, "kmeans_iterations": 10, "state_bits": 10},
    "quality": {"windows": 64, "rounds": 3, "kmeans_iterations": 20, "state_bits": 12},
}
MAX_VECTOR_SIZE = 4  # longer vectors pay little with at most 256 codewords


class ReALLMConfig(QuantizationConfigMixin):
    """Quantise linear layers with ReALLM (arXiv 2405.13155): codes of 1 to 8 bits a weight, outliers, a low-rank term.

    Without ``calibration`` matrices are quantised while the checkpoint is read, one at a time. With it, the model is
    loaded and then quantised layer by layer, each layer on the inputs that the quantised layers before it produce.

    Example:
        ```python
        config = ReALLMConfig(bits=3, calibration="some_text.txt")
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
        model.save_pretrained("quantised")           # about 3 bits a weight on disk
        ```

    Attributes:
        bits: code bits per weight; a multiple of 1/2, 1/3 or 1/4 such as 2, 2.5 or 3.
        rank: rank of the low-rank term; None takes ``max(4, round(min(in, out) / 64))`` for each matrix.
        vector_size: weights per code; None takes the most that keeps a code within 8 bits, at most 4.
        budget: bits per weight that all parts of all quantised layers may take together. A plan then chooses bits and
            rank for each matrix by error per byte, and ``bits``, ``rank`` and ``vector_size`` are not used. Needs
            ``calibration`` or ``own_windows``.
        preset: ``"fast"`` or ``"quality"``: how much calibration text and how many rounds.
        calibration: text to calibrate on: a file, a list of texts, a dataset with a ``text`` column, or token ids
            ``[windows, tokens]``. Not saved.
        tokenizer: for calibration texts; None takes the one saved beside the model. Not saved.
        windows: calibration windows; None takes the preset's.
        window_length: tokens in each.
        own_windows: as many more that the model writes itself, beside ``calibration`` or in place of it.
        own_start: the first token of each; None takes the model's ``bos_token_id``. Where a document of the model's
            training began with another token, that one makes it write more kinds of text.
        codebook, group_size, affine, decoder_bits, low_rank_bits, scale_bits, permute: see `MatrixShape`.
        state_bits: see `MatrixShape`; None takes the preset's. Each bit more doubles the time of the search.
        decoder: see `MatrixShape`; None takes the trellis where one scale a row and no other codebook is asked for.
        feedback, weighting, damping, outliers, rounds, kmeans_iterations, seed: see `Effort`; None takes the preset's.
        row_weights: weigh output rows by the squared gradient of the loss, from a backward pass over some of the
            calibration text.
        modules_to_not_convert: names or suffixes of layers to leave alone, beside the output head.
        shapes, plan: filled in by quantising: the distinct shapes, and each layer's index, rows and columns.
        format_version: of what is saved.
    """

    def __init__(
        self,
        bits: float = 3,
        rank: int | None = None,
        vector_size: int | None = None,
        budget: float | None = None,
        preset: str = "fast",
        calibration: Any = None,
        tokenizer: Any = None,
        windows: int | None = None,
        window_length: int = 1024,
        own_windows: int = 0,
        own_start: int | None = None,
        codebook: str = "kmeans",
        group_size: int = 0,
        affine: bool = False,
        decoder: str | None = None,
        decoder_bits: int = 8,
        low_rank_bits: int = 8,
        scale_bits: int = 16,
        permute: bool = True,
        state_bits: int | None = None,
        feedback: bool = True,
        weighting: bool = True,
        damping: float = 0.1,
        outliers: float | None = None,
        rounds: int | None = None,
        kmeans_iterations: int | None = None,
        seed: int = 0,
        row_weights: bool = True,
        modules_to_not_convert: list[str] | None = None,
        shapes: list[dict[str, Any]] | None = None,
        plan: dict[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            allowed = ", ".join(name for name in _OPTIONS if name not in ("shapes", "plan"))
            raise ValueError(f"ReALLMConfig has no option {next(iter(unknown))!r}; allowed: {allowed}.")
        values = locals()
        for name in _OPTIONS:
            setattr(self, name, values[name])
        self.quant_method = METHOD
        self.calibration, self.tokenizer = calibration, tokenizer
        self._check()

    def _check(self) -> None:
        if self.format_version not in READABLE:
            raise ValueError(
                f"This model was saved in format {self.format_version!r} of ReALLM; this version of hf_ext reads "
                f"formats {READABLE[0]} to {READABLE[-1]}. Install the version of hf_ext that saved it."
            )
        _check_choice("preset", self.preset, tuple(PRESETS))
        if not _is_number(self.bits) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be a number from 1 to 8, got {self.bits!r}.")
        if self.budget is not None and not 1.5 <= self.budget <= 16:
            raise ValueError(f"budget must be from 1.5 to 16 bits per weight, got {self.budget!r}.")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 0):
            raise ValueError(f"rank must be a whole number, at least 0, or None, got {self.rank!r}.")
        for name in ("windows", "window_length", "rounds", "kmeans_iterations"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}.")
        if not isinstance(self.own_windows, int) or self.own_windows < 0:
            raise ValueError(f"own_windows must be a whole number, at least 0, got {self.own_windows!r}.")
        if self.outliers not in (None, 0) and not (_is_number(self.outliers) and 2 <= self.outliers < math.inf):
            raise ValueError(f"outliers must be 0, at least 2 or None, got {self.outliers!r}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping!r}.")
        if self.budget is not None and not self.calibrated and self.plan is None:
            raise ValueError(
                "budget chooses shapes by error and needs calibration text, got calibration=None and own_windows=0."
            )
        _ = self.base_shape  # says what is wrong with it

    @property
    def base_shape(self) -> MatrixShape:
        """The shape of a matrix so large that nothing depends on its size."""
        return self.shape_for(2**15, 2**15)

    def shape_for(self, out_features: int, in_features: int) -> MatrixShape:
        """The shape of a matrix of that size where no plan says otherwise."""
        decoder = self._decoder()
        size = self.vector_size or _vector_size(self.bits, "kmeans" if decoder == "trellis" else self.codebook)
        code_bits = self.bits * size
        if code_bits != int(code_bits):
            raise ValueError(f"bits * vector_size must be a whole number, got {self.bits} * {size} = {code_bits}.")
        smaller = min(out_features, in_features)
        rank = max(4, round(smaller / 64)) if self.rank is None else self.rank
        return MatrixShape(
            size,
            int(code_bits),
            min(rank, smaller),
            decoder=decoder,
            state_bits=self.state_bits or PRESETS[self.preset]["state_bits"],
            **{name: getattr(self, name) for name in _SHAPE_OPTIONS},
        )

    def _decoder(self) -> str:
        if self.decoder is not None:
            return self.decoder
        plain = self.codebook == "kmeans" and not self.group_size and not self.affine and self.vector_size is None
        return "trellis" if plain and self.bits <= MAX_WIDTH else "identity"

    def effort(self) -> Effort:
        """How hard the solver tries."""
        preset = PRESETS[self.preset]
        return Effort(
            rounds=self.rounds or preset["rounds"],
            kmeans_iterations=self.kmeans_iterations or preset["kmeans_iterations"],
            feedback=self.feedback,
            weighting=self.weighting,
            damping=self.damping,
            outliers=self.outliers,
            seed=self.seed,
        )

    @property
    def calibrated(self) -> bool:
        """Whether there is text to calibrate on."""
        return self.calibration is not None or self.own_windows > 0

    @property
    def calibration_windows(self) -> int:
        """How many windows of calibration text are used."""
        return self.windows or PRESETS[self.preset]["windows"]

    def record(self, layers: Mapping[str, "ReALLMLinear"]) -> None:
        """Keep the shape and size of every quantised layer by name, to be saved."""
        distinct = list(dict.fromkeys(layer.shape for layer in layers.values()))
        self.format_version = FORMAT_VERSION
        self.shapes = [shape.to_dict() for shape in distinct]
        self.plan = {
            name: [distinct.index(layer.shape), layer.out_features, layer.in_features]
            for name, layer in layers.items()
        }

    def recorded(self) -> dict[str, MatrixShape]:
        """The shape of every quantised layer, as `record` kept it.

        Raises:
            ValueError: the plan is missing or damaged.
        """
        if not isinstance(self.plan, dict) or not isinstance(self.shapes, list) or not self.plan:
            raise ValueError("The quantization_config holds no plan of its layers; the checkpoint is damaged.")
        shapes = [MatrixShape.from_dict(shape) for shape in self.shapes]
        try:
            return {name: shapes[index] for name, (index, _, _) in self.plan.items()}
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"The plan of the layers does not fit the shapes listed with it ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """Every option as JSON values, without the calibration text and the tokenizer."""
        return {"quant_method": METHOD, **{name: copy.deepcopy(getattr(self, name)) for name in _OPTIONS}}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReALLMConfig":
        return ReALLMConfig(**self.to_dict(), calibration=self.calibration, tokenizer=self.tokenizer)


# in `ReALLMConfig.shape_for`, or by the solver
_CHOSEN = ("vector_size", "code_bits", "rank", "decoder", "state_bits", "rates", "outliers")
_SHAPE_OPTIONS = tuple(field.name for field in fields(MatrixShape) if field.name not in _CHOSEN)
_OPTIONS = tuple(
    name
    for name in ReALLMConfig.__init__.__code__.co_varnames[1 : ReALLMConfig.__init__.__code__.co_argcount]
    if name not in ("calibration", "tokenizer", "quant_method")
)


def _vector_size(bits: float, codebook: str) -> int:
    if codebook != "kmeans":
        return 1
    fitting = [size for size in range(MAX_VECTOR_SIZE, 0, -1) if float(bits * size).is_integer() and bits * size <= 8]
    if not fitting:
        raise ValueError(f"bits must be a whole number of bits per 1 to {MAX_VECTOR_SIZE} weights, got {bits!r}.")
    return fitting[0]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
