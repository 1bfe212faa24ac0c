"""Answers of dense tasks at the stored size of each picture: of the whole picture, or of windows that slide over it.

What a window says of pixel (u, v) of the stored picture is R logits C^T: R and C resample rows and columns bilinearly to the stored size
and divide by how many windows see a pixel. A grid of windows is a product of rows and columns, so the sum over windows of such
products is the mean of overlapping logits, resized, as MMSegmentation has it. Matrices come from the host, so that pictures of all sizes
share few compiled programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, Shaped

from maskvit.core.modalities import Modality
from maskvit.core.patches import resampling_matrix
from maskvit.core.types import Batch
from maskvit.data.augment.dense import covering_size, fitting_size
from maskvit.data.augment.geometry import mirror
from maskvit.data.augment.opencv import resize_bilinear, resize_nearest
from maskvit.sharding import batch_sharding, place_batch

BLOCK = 64  # rows of a stored picture whose scores are held at a time

Values = dict[str, np.ndarray]


class Round(NamedTuple):
    """Pictures whose answers are taken together: b pictures in v views (as it is; mirrored) of n windows each.

    `windows`: their (b v n) inputs, in that order; `rows`, `columns`: the matrices to the stored size, 0 for windows that are none;
    `target`: what is true at the stored size, missing (-1, NaN) beyond it; `valid`: False for pictures that are none.
    """

    windows: Batch
    rows: Float[Array, "b v n u h"]
    columns: Float[Array, "b v n p w"]
    target: Num[Array, "b u p *c"]
    valid: Any  # Bool "b"


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one moved back to end with the side (MMSegmentation)."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


@functools.lru_cache(maxsize=256)
def side_matrices(length: int, stored: int, window: int, stride: int) -> Float[np.ndarray, "n stored window"]:
    """Along one side: the matrices that take each window of a picture of `length` pixels to `stored` pixels; they add up to a resize."""
    whole, firsts = resampling_matrix(length, stored, "bilinear"), starts(length, window, stride)
    seen = np.zeros(length, np.float32)
    for first in firsts:
        seen[first : first + window] += 1
    matrices = np.zeros((len(firsts), stored, window), np.float32)
    for matrix, first in zip(matrices, firsts, strict=True):
        part = (whole / seen)[:, first : first + window]
        matrix[:, : part.shape[1]] = part
    return matrices


def read_out(
    values: Num[Array, "r h w k"], round_: Round, reduce: Callable[[Float[Array, "b v u p k"]], Shaped[Array, "b u p *c"]]
) -> Shaped[Array, "b u p *c"]:
    """What `reduce` makes of the answers of a round at the stored size, which are never held as a whole."""
    (b, v, n, u, h), (p, w) = round_.rows.shape, round_.columns.shape[-2:]
    values = values.astype(jnp.float32).reshape(b, v, n, h, w, -1)

    def block(rows: Float[Array, "b v n block h"]) -> Shaped[Array, "b block p *c"]:
        partial = jnp.einsum("bvnuh,bvnhwk->bvnuwk", rows, values, precision="highest")
        return reduce(jnp.einsum("bvnuwk,bvnpw->bvupk", partial, round_.columns, precision="highest"))

    rows = jnp.pad(round_.rows, ((0, 0),) * 3 + ((0, -u % BLOCK), (0, 0)))
    blocks = jnp.moveaxis(rows.reshape(b, v, n, -1, BLOCK, h), 3, 0)
    result = jnp.moveaxis(jax.lax.map(block, blocks), 0, 1)
    return result.reshape(b, -1, p, *result.shape[4:])[:, :u]


class StoredSize:
    """Batches of the loader to rounds.

    Args:
      modalities: of the inputs and the target; `inputs`: names of the former, `target` of the latter.
      crop: "pad" or None: how the loader brought whole pictures to the model's size.
      sliding: (window, stride): pictures are resized so that their short side is the window's, and cut into windows; None: whole.
      flip: whether each picture is also shown mirrored.
      multiple: sides of `Round.target` are multiples of it, so that fewer programs are compiled.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        inputs: tuple[str, ...],
        target: str,
        image_size: tuple[int, int],
        mesh: Mesh,
        crop: str | None,
        sliding: tuple[int, int] | None,
        flip: bool,
        multiple: int,
    ):
        self.inputs = {name: modalities[name] for name in inputs}
        self.target, self.image_size, self.mesh, self.crop = modalities[target], image_size, mesh, crop
        self.sliding, self.flip, self.multiple = sliding, flip, multiple
        if sliding is not None:
            for spec in self.inputs.values():
                spec.size((sliding[0], sliding[0]))

    def rounds(self, host: Mapping[str, Any]) -> Iterator[Round]:
        """The pictures of one of the loader's batches: all at once, or where windows slide as many as there are devices."""
        rows, dtypes = len(host["valid"]), {name: host[name].dtype for name in self.inputs}
        step = rows if self.sliding is None else len(self.mesh.local_devices)
        for first in range(0, rows, step):
            yield self._round([self._picture(host, row) for row in range(first, min(first + step, rows))], dtypes)

    def _picture(self, host: Mapping[str, Any], row: int) -> tuple[list[Values], Any, Any, np.ndarray]:
        """(inputs of every view's windows, matrices of rows "n u h" and of columns "v n p w", target) of one picture."""
        target = np.asarray(host[f"original/{self.target.name}"][row])
        height, width = target.shape[:2]
        if not height or not width:
            return [], np.zeros((0, 0, 0), np.float32), np.zeros((0, 0, 0, 0), np.float32), target
        if self.sliding is None:
            size = self.image_size if self.crop is None else fitting_size(height, width, self.image_size)
            whole = {name: host[name][row] for name in self.inputs}
            views = [whole, {name: _mirrored_part(x, self.inputs[name], size) for name, x in whole.items()}]
            rows = _widened(side_matrices(size[0], height, size[0], size[0]), self.image_size[0])
            columns = _widened(side_matrices(size[1], width, size[1], size[1]), self.image_size[1])
            windows = views[: 1 + self.flip]
        else:
            window, stride = self.sliding
            size = covering_size(height, width, (window, window))
            whole = {name: self._resized(np.asarray(host[f"original/{name}"][row]), spec, size) for name, spec in self.inputs.items()}
            views = [whole, {name: mirror_any(x, self.inputs[name]) for name, x in whole.items()}]
            places = [(top, left) for top in starts(size[0], window, stride) for left in starts(size[1], window, stride)]
            down, across = side_matrices(size[0], height, window, stride), side_matrices(size[1], width, window, stride)
            rows, columns = np.repeat(down, len(across), axis=0), np.tile(across, (len(down), 1, 1))
            windows = [self._window(view, place) for view in views[: 1 + self.flip] for place in places]
        # What is said of a mirrored picture is mirrored back.
        return windows, rows, np.stack([columns, columns[:, ::-1]][: 1 + self.flip]), target

    def _resized(self, array: np.ndarray, spec: Modality, size: tuple[int, int]) -> np.ndarray:
        """A stored picture at `size`, as the crops of dense tasks resize (`maskvit.data.augment.dense`)."""
        colors = array.dtype == np.uint8 and spec.channels == 3 and spec.kind == "continuous" and not spec.mirrored_channels
        return resize_bilinear(array, size) if colors else resize_nearest(array, size)

    def _window(self, view: Values, place: tuple[int, int]) -> Values:
        """One window of each input, at its own stride."""
        assert self.sliding is not None
        window = self.sliding[0]
        cut = {name: x[place[0] : place[0] + window, place[1] : place[1] + window] for name, x in view.items()}
        sizes = {name: spec.size((window, window)) for name, spec in self.inputs.items()}
        return {name: x if sizes[name] == (window, window) else resize_nearest(x, sizes[name]) for name, x in cut.items()}

    def _round(self, pictures: list[tuple[list[Values], Any, Any, np.ndarray]], dtypes: Mapping[str, Any]) -> Round:
        """Pictures of several sizes and numbers of windows as one round; the same shapes on every process."""
        views = 1 + self.flip
        size = self.image_size if self.sliding is None else (self.sliding[0], self.sliding[0])
        most = [max(len(rows) for _, rows, _, _ in pictures)]
        most += [-(-max(target.shape[axis] for *_, target in pictures) // self.multiple) * self.multiple for axis in (0, 1)]
        n, u, p = (max(1, side) for side in agreed_maximum(most))
        count = len(pictures)
        channels = {name: () if spec.kind == "categorical" else (spec.channels,) for name, spec in self.inputs.items()}
        values = {
            name: np.zeros((count, views, n, *spec.size(size), *channels[name]), dtypes[name]) for name, spec in self.inputs.items()
        }
        rows, columns = np.zeros((count, views, n, u, size[0]), np.float32), np.zeros((count, views, n, p, size[1]), np.float32)
        ids = self.target.kind == "categorical"
        dtype = np.int32 if ids else np.float32
        target = np.full((count, u, p) if ids else (count, u, p, self.target.channels), -1 if ids else np.nan, dtype)
        for i, (windows, down, across, truth) in enumerate(pictures):
            if not windows:
                continue
            number, height, width = len(down), *truth.shape[:2]
            for name, array in values.items():
                array[i, :, :number] = np.stack([window[name] for window in windows]).reshape(views, number, *array.shape[3:])
            rows[i, :, :number, :height] = down
            columns[i, :, :number, :width] = across
            target[i, :height, :width] = truth
        flat = {name: x.reshape(-1, *x.shape[3:]) for name, x in values.items()}
        place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        valid = np.array([bool(windows) for windows, *_ in pictures])
        return Round(place_batch(flat, self.mesh), place(rows), place(columns), place(target), place(valid))


def agreed_maximum(numbers: list[int]) -> list[int]:
    """The greatest of each number over all processes, which must all ask."""
    if jax.process_count() == 1:
        return numbers
    return multihost_utils.process_allgather(np.array(numbers)).max(axis=0).tolist()


def mirror_any(array: Shaped[np.ndarray, "h w *c"], spec: Modality) -> Shaped[np.ndarray, "h w *c"]:
    """Left to right; of directions the sign changes too."""
    return array[:, ::-1] if spec.kind == "categorical" else mirror(array, spec)


def _mirrored_part(array: np.ndarray, spec: Modality, size: tuple[int, int]) -> np.ndarray:
    """The part of `size` (in image pixels) that is no padding, mirrored where it stands."""
    height, width = (-(-side // spec.stride) for side in size)
    result = array.copy()
    result[:height, :width] = mirror_any(array[:height, :width], spec)
    return result


def _widened(matrices: Float[np.ndarray, "n u h"], side: int) -> Float[np.ndarray, "n u side"]:
    """With columns of zeros for the padding behind a picture."""
    return np.pad(matrices, ((0, 0), (0, 0), (0, side - matrices.shape[2])))

