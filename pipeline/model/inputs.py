"""The arrays that a model takes for token windows.

Text decides most inputs. A model that takes text alone, or in its decoder alone (Whisper), gets a
window as it is. Of an encoder–decoder for text, the encoder reads the first half of a window, and
the decoder is teacher-forced on the second half: it takes the tokens that its model's preprocessor
starts it with, then all tokens of the half but the last. Arrays that a user gives are passed on.
Without them, a model with a vision or audio encoder gets as many images as KerasHub's preprocessor
makes of text alone: none, or an empty one where the model must have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import tree
from numpy.typing import NDArray

from pipeline.calibration.arrays import ExpectedInput
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import SourceError
from pipeline.model.blocks import find_encoders
from pipeline.model.skeleton import Skeleton

_ONE_TEXT = (
    "token_ids",
    "padding_mask",
    "segment_ids",
    "position_ids",
    "mask_positions",
    "response_mask",
)
_ENCODER_TEXT = ("encoder_token_ids", "encoder_padding_mask")
_DECODER_TEXT = ("decoder_token_ids", "decoder_padding_mask")


@dataclass(frozen=True, kw_only=True)
class InputBatch:
    """A model's inputs for some windows.

    Attributes:
        arrays: [batch, …] by name, in the model's dtypes.
        tokens, mask: [batch, sequence]: what the model predicts the next token of, and where that
            is text; no tokens if it takes none.
        windows: [batch]: False for a window that only fills up a batch.
        other_mask: [batch, sequence]: where an encoder's text is, if the model takes two texts.
        beside: whether the model puts images or sounds before or among the text; `empty` if they
            stand for none.
    """

    arrays: Mapping[str, NDArray[Any]]
    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    windows: NDArray[np.bool_]
    other_mask: NDArray[np.bool_] | None = None
    beside: bool = False
    empty: bool = False

    def structured(self, model: keras.Model) -> Any:
        """The arrays in the structure that a model of the same inputs takes."""
        return tree.map_structure(lambda tensor: self.arrays[tensor.name], model._inputs_struct)

    def rows(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """Which vectors in an array are of the windows' content.

        Args:
            shape: of the array, without the axes of the vectors: [batch, positions] for most.

        Raises:
            SourceError: an array that is neither by positions nor by windows.
        """
        num_windows, length = self.mask.shape
        if tuple(shape) == (num_windows,):
            return self.windows
        if len(shape) != 2 or shape[0] != num_windows:
            if tuple(shape) == (num_windows * length,):
                return self.mask.reshape(-1)
            raise SourceError(
                f"a layer's input has vectors in the shape {list(shape)}, of which it is not known "
                f"which belong to the {num_windows} windows' padding; give the layer a scheme that "
                "needs no calibration, such as int8, or null"
            )
        for mask in (self.mask, self.other_mask):
            if mask is not None and mask.shape[1] == shape[1]:
                return mask
        whole = np.broadcast_to(self.windows[:, None], tuple(shape))
        if not self.beside or shape[1] < length:
            return whole
        # Images stand before the text.
        before = whole[:, : shape[1] - length]
        return np.concatenate([before & (not self.empty), self.mask], axis=1)


@dataclass(frozen=True, kw_only=True)
class InputLayout:
    """What a model takes.

    Attributes:
        inputs: what it takes, by name.
        encoders: whether images or sounds pass a model of their own before they join the text.
    """

    inputs: Mapping[str, ExpectedInput]
    encoders: bool = False
    name: str = field(default="the model", compare=False)

    @property
    def takes_text(self) -> bool:
        return bool({"token_ids", "decoder_token_ids"} & set(self.inputs))

    @property
    def takes_two_texts(self) -> bool:
        """Whether the encoder takes a text of its own."""
        return {"encoder_token_ids", "decoder_token_ids"} <= set(self.inputs)

    def missing(self, given: Iterable[str]) -> list[str]:
        """Inputs that neither text nor the given arrays determine."""
        return sorted(set(self.inputs) - self._of_text() - set(given))

    def check(self, given: Iterable[str]) -> None:
        """Check that text and the given arrays determine all inputs.

        Raises:
            SourceError: names an input that they do not, and the option.
        """
        unknown = self.missing(given)
        if unknown and not self.encoders:
            shape = ", ".join("any" if n is None else str(n) for n in self.inputs[unknown[0]].shape)
            raise SourceError(
                f"{self.name}: the model has an input {unknown[0]!r} that text does not determine; "
                f"give it in the recipe, as calibration: {{inputs: {{{unknown[0]}: URL.npy}}}}, an "
                f"array [samples, {shape}], or choose a recipe that needs no calibration, such as "
                "int8"
            )

    def batch(self, windows: TokenWindows, chosen: slice | Sequence[int], size: int) -> InputBatch:
        """The inputs for some windows.

        Args:
            size: of the batch; it is filled up with windows without text.

        Raises:
            SourceError: as `check`.
        """
        self.check(windows.inputs)
        tokens, mask = windows.tokens[chosen], windows.mask[chosen]
        fill = size - len(tokens)
        is_window = np.arange(size) < len(tokens)
        tokens, mask = np.pad(tokens, ((0, fill), (0, 0))), np.pad(mask, ((0, fill), (0, 0)))
        given = {
            name: np.pad(array[chosen], ((0, fill), *((0, 0) for _ in array.shape[1:])))
            for name, array in windows.inputs.items()
        }
        other_mask = None
        found = _one_text(tokens, mask)
        if self.takes_two_texts:
            encoder, decoder = split(tokens, mask, windows.decoder_start)
            found |= dict(zip(_ENCODER_TEXT, encoder, strict=True))
            found |= dict(zip(_DECODER_TEXT, decoder, strict=True))
            (tokens, mask), other_mask = decoder, encoder[1]
        else:
            found |= dict(zip(_DECODER_TEXT, (tokens, mask), strict=True))
        empty = {
            name: _empty(name, expected, *mask.shape)
            for name, expected in self.inputs.items()
            if name not in given and name not in self._of_text()
        }
        found |= empty | given
        arrays = {name: found[name].astype(self.inputs[name].dtype) for name in self.inputs}
        return InputBatch(
            arrays=arrays,
            tokens=tokens,
            mask=mask,
            windows=is_window,
            other_mask=other_mask,
            beside=self.encoders,
            empty=bool(empty),
        )

    def _of_text(self) -> set[str]:
        names = {*_ONE_TEXT, *_DECODER_TEXT}
        # An encoder of sounds may have a mask of the same name.
        return names | set(_ENCODER_TEXT) if self.takes_two_texts else names


def input_layout(skeleton: Skeleton) -> InputLayout:
    """What a model takes."""
    backbone, encoders = skeleton.backbone, find_encoders(skeleton.backbone)
    inputs = {}
    # An encoder's own inputs may have more definite shapes.
    definite = {
        str(tensor.name): tensor
        for encoder in encoders
        for tensor in getattr(encoder, "inputs", None) or ()
    }
    # A task may take more, such as the positions to predict at.
    for tensor in (*backbone.inputs, *skeleton.model.inputs):
        name = str(tensor.name)
        shapes = [tensor.shape[1:]]
        if name in definite and len(definite[name].shape) == len(tensor.shape):
            shapes.append(definite[name].shape[1:])
        shape = tuple(next((n for n in sizes if n), None) for sizes in zip(*shapes, strict=True))
        inputs[name] = ExpectedInput(shape=shape, dtype=str(tensor.dtype))
    return InputLayout(inputs=inputs, encoders=bool(encoders), name=str(backbone.name))


def _one_text(tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Every input that one text alone determines, by KerasHub's names, each [batch, sequence]."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "token_ids": tokens,
        "padding_mask": mask,
        "segment_ids": np.zeros_like(tokens),
        "position_ids": positions,
        # A masked language model predicts at these positions: everywhere.
        "mask_positions": positions,
        # All text is an answer, which is read from left to right.
        "response_mask": mask,
    }


def split(
    tokens: NDArray[np.int32], mask: NDArray[np.bool_], start: Sequence[int]
) -> tuple[
    tuple[NDArray[np.int32], NDArray[np.bool_]], tuple[NDArray[np.int32], NDArray[np.bool_]]
]:
    """Cut windows into what encoder and decoder read, as (tokens, mask) each.

    The encoder always has the more positions, so that a position's axis tells the two apart.

    Args:
        tokens, mask: [batch, sequence].
        start: what the decoder begins with.
    """
    num_windows, length = tokens.shape
    num_start = len(start)
    for_decoder = max(length - num_start, 0) // 2
    encoder = np.zeros((num_windows, length - for_decoder), np.int32)
    decoder = np.zeros((num_windows, max(for_decoder + num_start - 1, 1)), np.int32)
    encoder_mask, decoder_mask = np.zeros(encoder.shape, bool), np.zeros(decoder.shape, bool)
    for row, size in enumerate(mask.sum(axis=1)):
        targets = max(int(size) - num_start, 0) // 2
        source = int(size) - targets
        encoder[row, :source] = tokens[row, :source]
        encoder_mask[row, :source] = True
        if targets:
            given = [*start, *tokens[row, source : source + targets - 1]]
            decoder[row, : len(given)] = given
            decoder_mask[row, : len(given)] = True
    return (encoder, encoder_mask), (decoder, decoder_mask)


def _empty(name: str, expected: ExpectedInput, num_windows: int, length: int) -> NDArray[Any]:
    """No image or sound, as KerasHub's preprocessors give for text alone.

    Where the number of images is free there is none; an image of fixed size is black.
    """
    shape = expected.shape
    if len(shape) == 1 and name.endswith("_mask"):
        return np.zeros((num_windows, length), expected.dtype)  # of the text's positions
    if shape[0] is None:
        shape = (0, *shape[1:])
    return np.zeros((num_windows, *(1 if size is None else size for size in shape)), np.float32)
