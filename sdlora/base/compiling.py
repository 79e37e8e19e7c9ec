"""Compiled blocks of a UNet, and how it is known that compiling does not work on a machine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

FORMS = 256
"""Compiled forms of the blocks' code that torch keeps, at most; it computes further ones as they are."""


def compile_blocks(unet: nn.Module) -> None:
    """Have each transformer block of ``unet`` compiled when it is called, with the layers that it then has.

    Blocks with the same widths share one compiled form, so it takes seconds for each width instead of minutes for the whole
    UNet. Sizes are fixed in it: another size of image or number of images makes another form.
    """
    from torch._dynamo import config

    config.load_config({"recompile_limit": FORMS})
    for block in _transformer_blocks(unet):
        block.compile(dynamic=False)


def restore_blocks(unet: nn.Module) -> None:
    """Have the blocks computed as they are again: the inverse of ``compile_blocks``."""
    for block in _transformer_blocks(unet):
        block._compiled_call_impl = None


def compiling_failed(error: Exception) -> bool:
    """Whether ``error`` comes from compiling: there is no compiler, or it does not take the code."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler, OperatorIssue

    return isinstance(error, TorchDynamoException | CppCompileError | InvalidCxxCompiler | OperatorIssue)


def _transformer_blocks(unet: nn.Module) -> Iterator[nn.Module]:
    return (module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock")
