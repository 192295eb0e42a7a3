"""Makes the goldens: `python -m tests.trellis.make_goldens UPSTREAM`, outputs of upstream's modules by `golden_rules`.

UPSTREAM: a checkout of GAP-LAB-CUHK-SZ/ReconViaGen at the commit that tests/data/trellis/README.md names. Its compiled
packages are replaced: sparse convolutions by dense ones, flash-attn by torch's attention. Needs easydict and tqdm.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.trellis import golden_rules as rules

GOLDENS = Path(__file__).parents[1] / "data" / "trellis"


class DenseConv(nn.Module):
    """spconv's SubMConv3d by a dense convolution of the whole grid."""

    def __init__(self, channels: int, out: int, kernel: int, **_: Any) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = channels, out, kernel
        self.weight = nn.Parameter(torch.zeros(out, kernel, kernel, kernel, channels))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Any) -> Any:
        features, coords = x.features, x.indices.long()
        if self.kernel == 1:
            flat = self.weight.view(self.in_channels, self.out_channels)  # as spconv reads this memory
            return x.replace_feature(features @ flat + self.bias)
        side = int(coords[:, 1:].max()) + 1
        dense = torch.zeros(self.in_channels, side, side, side)
        dense[:, coords[:, 1], coords[:, 2], coords[:, 3]] = features.float().t()
        result = functional.conv3d(dense[None], self.weight.float().permute(0, 4, 1, 2, 3), padding=1)[0]
        result = result[:, coords[:, 1], coords[:, 2], coords[:, 3]].t() + self.bias.float()
        return x.replace_feature(result.to(features.dtype))


class DenseTensor:
    """spconv's SparseConvTensor."""

    def __init__(self, features: Tensor, indices: Tensor, spatial_shape: Any, batch_size: int, *_: Any) -> None:
        self._features, self.indices, self.spatial_shape, self.batch_size = features, indices, spatial_shape, batch_size
        self.grid = self.voxel_num = self.thrust_allocator = self._timer = self.force_algo = self.int8_scale = None
        self.indice_dict: dict[str, Any] = {}
        self.benchmark, self.benchmark_record = False, dict[str, Any]()

    @property
    def features(self) -> Tensor:
        return self._features

    def replace_feature(self, features: Tensor) -> DenseTensor:
        return DenseTensor(features, self.indices, self.spatial_shape, self.batch_size)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _of_lengths(q: Tensor, k: Tensor, v: Tensor, q_ends: Any, k_ends: Any, *_: Any) -> Tensor:
    parts = zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
    return torch.cat([_attention(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in parts])


def _module(name: str, path: Path | None = None, **contents: Any) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(contents)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def upstream(root: Path) -> SimpleNamespace:
    """Upstream's modules on the CPU, without the imports of its packages' `__init__`."""
    sys.path[:0] = [str(root), str(root / "wheels" / "vggt")]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    algorithms = SimpleNamespace(Native=0, MaskImplicitGemm=1)
    _module("spconv", root)
    _module(
        "spconv.pytorch", ConvAlgo=algorithms, SubMConv3d=DenseConv, SparseConv3d=DenseConv,
        SparseInverseConv3d=DenseConv, SparseConvTensor=DenseTensor,
    )  # fmt: skip
    _module(
        "flash_attn",
        flash_attn_qkvpacked_func=lambda qkv: _attention(*qkv.unbind(2)),
        flash_attn_kvpacked_func=lambda q, kv: _attention(q, *kv.unbind(2)),
        flash_attn_func=_attention,
        flash_attn_varlen_func=_of_lengths,
        flash_attn_varlen_qkvpacked_func=lambda qkv, ends, longest: _of_lengths(*qkv.unbind(1), ends, ends),
        flash_attn_varlen_kvpacked_func=lambda q, kv, q_ends, k_ends, *_: _of_lengths(q, *kv.unbind(1), q_ends, k_ends),
    )
    _module("plyfile", PlyData=object, PlyElement=object)
    _module("trimesh", Trimesh=object)
    trellis = root / "trellis"
    for name in ("", ".utils", ".representations", ".representations.gaussian", ".representations.mesh", ".pipelines"):
        _module(f"trellis{name}", trellis / name.replace(".", "/").strip("/"))
    for name in ("render_utils", "postprocessing_utils", "loss_utils"):
        _module(f"trellis.utils.{name}")
    gaussian = importlib.import_module("trellis.representations.gaussian.gaussian_model").Gaussian
    cubes = importlib.import_module("trellis.representations.mesh.cube2mesh")
    for made in (gaussian, cubes.SparseFeatures2Mesh):
        defaults = made.__init__.__defaults__
        made.__init__.__defaults__ = tuple("cpu" if each == "cuda" else each for each in defaults)
    representations, mesh = sys.modules["trellis.representations"], sys.modules["trellis.representations.mesh"]
    representations.__dict__.update(Gaussian=gaussian, MeshExtractResult=cubes.MeshExtractResult)
    mesh.__dict__.update(SparseFeatures2Mesh=cubes.SparseFeatures2Mesh)
    return SimpleNamespace(
        models=importlib.import_module("trellis.models"),
        sparse=importlib.import_module("trellis.modules.sparse"),
        sampler=importlib.import_module("trellis.pipelines.samplers.flow_euler").FlowEulerGuidanceIntervalSampler,
        cubes=cubes,
        aggregator=importlib.import_module("vggt.models.aggregator"),
        vision=importlib.import_module("vggt.layers.vision_transformer"),
    )


def _filled(module: nn.Module) -> Any:
    module.load_state_dict(rules.weights(module.state_dict()))
    return module.eval()


def _voxels(up: SimpleNamespace, coords: Tensor, features: Tensor) -> Any:
    return up.sparse.SparseTensor(feats=features, coords=functional.pad(coords, (1, 0)).int())


def networks(up: SimpleNamespace, half: bool) -> dict[str, Tensor]:
    """The outputs of all networks, in fp32 or fp16."""

    def made(name: str) -> Any:
        return _filled(getattr(up.models, name)(**rules.ARGUMENTS[name], use_fp16=half))

    out: dict[str, Tensor] = {}
    time = torch.tensor([rules.TIME])
    flow = made("SparseStructureFlowModel")
    x, context = rules.values("structure", 1, 8, 8, 8, 8), rules.values("context", 1, 50, 96)
    out["structure conditional"] = flow(x, time, context)
    out["structure unconditional"] = flow(x, time, torch.zeros_like(context))
    out["sampled"] = (
        up.sampler(1e-5)
        .sample(
            flow, x, context, torch.zeros_like(context), cfg_strength=rules.STRENGTH + 1, verbose=False, **rules.SAMPLER
        )
        .samples
    )
    flow, coords = made("SLatFlowModel"), rules.voxels()
    latents = rules.values("latents", len(coords), 8)
    contexts = list(rules.values("contexts", rules.VIEWS, 1, 30, 96))
    out["latents conditional"] = flow(_voxels(up, coords, latents), time, contexts).feats
    nothing = [torch.zeros_like(each) for each in contexts]
    out["latents unconditional"] = flow(_voxels(up, coords, latents), time, nothing).feats
    condition = made("ModulatedMultiViewCond")
    aggregated, features = (
        rules.values("tokens", 4, rules.VIEWS, 21, 192),
        rules.values("features", rules.VIEWS, 21, 96),
    )
    # upstream's forward has the full size's widths in it: its blocks are called here as it calls them
    tokens = condition.multiview_cond_tokens
    for block, of_layer in zip(condition.cond_blocks, aggregated, strict=True):
        tokens = block(
            tokens, torch.cat([of_layer[:, 5:], features[:, 5:]], -1).flatten(0, 1)[None].to(condition.dtype)
        )
    out["structure condition"] = tokens
    aggregated = rules.values("wide tokens", 24, 1, rules.VIEWS, 7, 2048)
    features = rules.values("wide features", 1, rules.VIEWS, 7, 1024)
    out["latents condition"] = made("ModulatedSLATMultiViewCond")(list(aggregated), features)
    out["occupancy"] = made("SparseStructureDecoder")(rules.values("structure to decode", 1, 8, 4, 4, 4))
    gaussian = made("SLatGaussianDecoder")(_voxels(up, coords, latents))[0]
    for name in ("_xyz", "_features_dc", "_scaling", "_rotation", "_opacity"):
        out[f"gaussians {name}"] = getattr(gaussian, name)[rules.GAUSSIAN_ROWS]
    decoder, seen = made("SLatMeshDecoder"), {}
    type(decoder.mesh_extractor).__call__ = lambda self, cubes, training=False: seen.update(cubes=cubes)
    decoder(_voxels(up, coords, latents))
    out["cube coordinates"] = seen["cubes"].coords[:, 1:].to(torch.int16)
    out["cube features"] = seen["cubes"].feats[rules.FEATURE_ROWS]
    return out


def vision(up: SimpleNamespace) -> dict[str, Tensor]:
    """The outputs of VGGT's aggregator and of DINOv2's network, which is part of it, in fp32."""
    arguments, module = rules.AGGREGATOR, up.aggregator
    module.vit_large = lambda **others: up.vision.DinoVisionTransformer(
        embed_dim=arguments["channels"], depth=arguments["depth"], num_heads=arguments["heads"], mlp_ratio=4,
        block_fn=partial(module.Block, attn_class=up.vision.MemEffAttention), **others,
    )  # fmt: skip
    made = _filled(
        module.Aggregator(
            img_size=rules.AGGREGATOR_PIXELS, embed_dim=arguments["channels"], depth=arguments["depth"],
            num_heads=arguments["heads"],
        )
    )  # fmt: skip
    images = rules.values("images", rules.VIEWS, 3, rules.AGGREGATOR_PIXELS, rules.AGGREGATOR_PIXELS).sigmoid()
    tokens = made(images[None])[0]
    features = made.patch_embed.forward_features(rules.values("normalised images", *images.shape))["x_prenorm"]
    return {f"aggregated {layer}": each[0] for layer, each in enumerate(tokens)} | {"vision tokens": features}


def cubes(up: SimpleNamespace) -> dict[str, Tensor]:
    """The mesh of random cubes."""
    coords, features = rules.cubes()
    mesh = up.cubes.SparseFeatures2Mesh(res=rules.CUBE_GRID, use_color=True)(_voxels(up, coords, features))
    return {
        "mesh vertices": mesh.vertices,
        "mesh faces": mesh.faces.to(torch.int16),
        "mesh attributes": mesh.vertex_attrs,
    }


def main() -> None:
    up = upstream(Path(sys.argv[1]).resolve())
    with torch.no_grad():
        made = cubes(up) | vision(up) | networks(up, half=False)
        halves = networks(up, half=True)
    for name, tensors in (("fp32", made), ("fp16", halves)):
        kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(kept, GOLDENS / f"{name}.safetensors")
        print(name, sum(each.numel() * each.element_size() for each in kept.values()))


if __name__ == "__main__":
    main()
