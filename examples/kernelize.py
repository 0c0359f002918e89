"""Kernels from the Hub or a local folder: `--model.patch kernelize.py:kernelize`. Copy this file and change KERNELS.

transformers marks layers by name (RMSNorm and SiLU in the tested architectures). The package `kernels` (uv sync --extra
kernels) puts a kernel's forward in their place; weights and their names stay. lacuna calls kernelize(model) with the
empty model, on the meta device, before it does anything else to it. docs/changing.md shows what is in such a folder.
"""

from pathlib import Path

import kernels
import torch

KERNELS = {
    "RMSNorm": kernels.LocalLayerRepository(Path("my_kernels").absolute(), layer_name="MyNorm"),
    # from the Hub: kernels.LayerRepository("OWNER/REPO", layer_name="MyNorm", version=1)
}


def kernelize(model):
    """Replace the layers that KERNELS names; a name that this model does not have is an error."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marked = {module.kernel_layer_name for module in model.modules() if hasattr(module, "kernel_layer_name")}
    for name in KERNELS:
        if name not in marked:  # or transformers does not know this version of the package, and has marked nothing
            raise ValueError(f"{type(model).__name__} marks no {name}, only {sorted(marked)}")
    with kernels.use_kernel_mapping({name: {device: kernel} for name, kernel in KERNELS.items()}):
        # TORCH_COMPILE is left out: it would leave the layer as it was, in silence, where a kernel cannot be compiled.
        # Without it torch.compile says so; then set train.compile = false.
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device=device)
