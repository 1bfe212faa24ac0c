"""What a pickle may mention: what tensors are made of, and classes of bookkeeping, whose objects inert ones stand for."""

from __future__ import annotations

from typing import Any

STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# torch's names of number types, memory layouts and formats, which settings mention.
TORCH_NAMES = (
    *"float64 float32 float16 bfloat16 float double half int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64".split(),
    *"complex128 float8_e4m3fn float8_e5m2 strided sparse_coo contiguous_format channels_last preserve_format".split(),
)
NUMPY = ("numpy.core", "numpy._core")
BUILTINS = ("builtins", "__builtin__")
# Classes and functions whose results are bookkeeping: by whole name, and by the package that they are of.
INERT = frozenset(
    [
        *(f"{numpy}.{name}" for numpy in NUMPY for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")),
        *(f"numpy.{name}" for name in "ndarray dtype float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8".split()),
        *(f"numpy.{name}" for name in ("bool_", "bool", "str_", "bytes_", "longlong", "complex64", "complex128")),
        *(f"{module}.{name}" for module in BUILTINS for name in "set frozenset complex bytearray bytes range xrange slice object".split()),
        *(f"{module}.{name}" for module in BUILTINS for name in "int float str bool list dict tuple unicode long".split()),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *("collections.deque", "types.SimpleNamespace", "argparse.Namespace", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
        *("time.struct_time", "functools.partial", "_codecs.encode", "typing.Any", "typing.Union", "random.Random"),
        *("torch.Generator", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
    ]
)
INERT_PACKAGES = (
    *("numpy.random.", "numpy.dtypes.", "torch.optim.", "torch.cuda.amp.", "torch.amp.", "torch.distributed."),
    *("omegaconf.", "yacs.config.", "addict.", "easydict.", "ml_collections.", "munch.", "attrdict.", "box.", "fvcore.common.config."),
    *("torch.nn.modules.", "torch.nn.parallel."),
    *("mmengine.config.", "mmcv.utils.config.", "mmengine.logging.", "detectron2.config.", "torchmetrics.", "accelerate.", "deepspeed."),
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities."),
    *("transformers.training_args.", "transformers.trainer_utils.", "transformers.trainer_pt_utils.", "transformers.integrations."),
)
RECONSTRUCTORS = ("copyreg._reconstructor", "copy_reg._reconstructor")


class Inert:
    """Stands for an object of another package.

    Attributes:
      name: of its class, as the file has it.
      facts: the attributes and entries under string keys that the file gives it.
    """

    __slots__ = ("facts", "name")

    def __init__(self, name: str):
        self.name = name
        self.facts: dict[str, Any] = {}


class Global:
    """A name that a pickle mentions. It stands for nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Stored:
    """A reference to a storage: its type by torch's name, its key in the archive, and how many values it has."""

    __slots__ = ("count", "key", "kind")

    def __init__(self, kind: str, key: str, count: int):
        self.kind, self.key, self.count = kind, key, count


def is_inert(name: str) -> bool:
    """Whether what a global makes is mere bookkeeping."""
    return name in INERT or name.startswith(INERT_PACKAGES)
