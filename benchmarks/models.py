"""Which models of others are placed: built without weights, quantised, exported, compared.

torchvision's and timm's names by default, the smallest of each family; any that ``--model`` takes
can be given.

    python benchmarks/models.py --json docs/models.json --report docs/models.md
    python benchmarks/models.py --models timm:resnet18 regnet_x_400mf --json models.json

Models that the json file has are kept; remove one to try it again. ``--quick`` only places them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqakd_deploy.api import export, verify
from sqakd_deploy.errors import SqakdError
from sqakd_deploy.files import write_text
from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.distillation import distill

CLASSES, CALIBRATED, COMPARED = 10, 24, 16  # images

# timm's, by the size of images: what a network's windows need, else small ones.
SMALL = 64
TIMM = {
    56: """
        aimv2_large_patch14_224 deepseek_vit_412m eva02_tiny_patch14_224
        vit_giant_patch14_dinov2
    """,
    SMALL: """
        beit_base_patch16_224 cait_xxs24_224 coat_tiny convmixer_768_32 convnext_atto
        convnextv2_atto cspdarknet53 cspresnet50 darknet53 deit_tiny_patch16_224 dla34
        dm_nfnet_f0 dpn48b eca_nfnet_l0 eca_resnext26ts edgenext_xx_small efficientnet_lite0
        ese_vovnet19b_dw fastvit_t8 fbnetc_100 fbnetv3_b gcresnext26ts gernet_s ghostnet_100
        ghostnetv2_100 ghostnetv3_100 hardcorenas_a hrnet_w18_small inception_next_atto
        lcnet_050 mnasnet_small mobilenetv4_conv_small mobilenetv4_hybrid_medium
        mobileone_s0 mobilevit_xxs mobilevitv2_050 nf_regnet_b0 nf_resnet50 poolformer_s12
        poolformerv2_s12 regnetv_040 regnetx_002 regnety_002 regnetz_b16 repvgg_a0
        repvit_m0_9 res2net50_26w_4s res2next50 resnest14d resnet10t resnetv2_50x1_bit
        rexnet_100 rexnetr_100 selecsls42 semnasnet_075 seresnext26ts skresnet18
        spnasnet_100 tf_mobilenetv3_small_100 tinynet_e tresnet_m vit_tiny_patch16_224
        vovnet39a xcit_nano_12_p16_224

        coatnet_0_rw_224 convit_tiny cpubone_nano davit_tiny efficientvim_m1 efficientvit_b0
        fasternet_t0 focalnet_tiny_lrf gcvit_xxtiny gemma4_vit_167m hgnetv2_b0 iformer_t
        lcnetv2_small legacy_seresnet18 lowformer_b0 mambaout_femto mvitv2_tiny
        naflexvit_base_patch16_map nest_tiny_jx nextvit_small pvt_v2_b0 qwen3_vit_88m
        rdnet_tiny repghostnet_050 samvit_base_patch16_224 sequencer2d_s shvit_s1
        starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
        tiny_vit_5m_224 tnt_s_patch16_224 twins_svt_small visformer_tiny
        vit_relpos_small_patch16_224 vit_small_patch16_dinov3
        vit_so150m_patch16_reg4_map_256 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    """,
    96: """
        inception_resnet_v2 inception_v3 inception_v4 legacy_xception xception41 xception65p
    """,
    256: """
        bat_resnext26ts
    """,
    240: """
        crossvit_9_240
    """,
    224: """
        efficientformer_l1 efficientformerv2_s0 efficientvit_m0 gmlp_ti16_224 levit_128s
        mixer_s32_224 pit_ti_224 resmlp_12_224
    """,
}
TORCHVISION = {
    SMALL: """
        convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5
        mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d
        shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t wide_resnet50_2
    """,
    96: """
        inception_v3
    """,
    224: """
        alexnet maxvit_t vgg11_bn vit_b_32
    """,
}
_TWO_BLOCKS = {"depth": 2, "embed_dim": 96, "num_heads": 3}
SMALLER: Mapping[str, Mapping[str, Any]] = {
    f"timm:{name}": arguments
    for name, arguments in {
        "aimv2_large_patch14_224": _TWO_BLOCKS,
        "beit_base_patch16_224": _TWO_BLOCKS,
        "deepseek_vit_412m": _TWO_BLOCKS,
        "eva02_tiny_patch14_224": {"depth": 2},
        "gemma4_vit_167m": _TWO_BLOCKS,
        "naflexvit_base_patch16_map": _TWO_BLOCKS,
        "samvit_base_patch16_224": _TWO_BLOCKS | {"global_attn_indexes": (1,)},
        "sequencer2d_s": {"layers": (1, 1, 1, 1)},
        "swinv2_cr_tiny_224": {"depths": (2, 1, 1, 1)},
        "twins_svt_small": {"depths": (2, 2, 2, 2)},
        "vit_giant_patch14_dinov2": _TWO_BLOCKS,
        "vit_small_patch16_dinov3": {"depth": 2},
        "vit_so150m_patch16_reg4_map_256": _TWO_BLOCKS,
    }.items()
}
"""Arguments of models that are made smaller than published: fewer blocks of the same kinds."""
SIZES = {name: size for size, names in TORCHVISION.items() for name in names.split()}
SIZES |= {f"timm:{name}": size for size, names in TIMM.items() for name in names.split()}


def pictures(count: int, size: int, seed: int) -> Tensor:
    """Smooth noise ``(N, 3, size, size)``: neighbours are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def built(name: str, size: int) -> torch.nn.Module:
    """The model, for that size where its factory asks for one."""
    torch.manual_seed(0)
    asked = {"img_size": size} if name.startswith("timm:") else {"image_size": size}
    fewer = SMALLER.get(name, {})
    try:
        return build_model(name, num_classes=CLASSES, args={**asked, **fewer}).eval()
    except SqakdError:
        return build_model(name, num_classes=CLASSES, args=fewer).eval()


def tried(name: str, *, quick: bool) -> dict[str, Any]:
    """What became of a model."""
    start = time.perf_counter()
    size = SIZES.get(name, SMALL)
    facts: dict[str, Any] = {"size": size}
    try:
        facts |= _placed(name, size, quick=quick)
    except SqakdError as error:
        facts |= {"refused": str(error).split(" Exclude it")[0]}
    return facts | {"seconds": round(time.perf_counter() - start)}


def _placed(name: str, size: int, *, quick: bool) -> dict[str, Any]:
    model, images = built(name, size), pictures(CALIBRATED, size, seed=0)
    quantize(model, example=images)  # says so, if the model is not for such images
    if quick:
        return {"placed": True}
    reestimate_batch_norm(model, images)
    student = quantize(model, example=images)
    config = DistillConfig(epochs=0, calibration_images=CALIBRATED, bn_images=CALIBRATED)
    distill(student, images, teacher=model, config=config)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(student, Path(folder) / "model.onnx")
        report = verify(artifact, student, pictures(COMPARED, size, seed=5))
    errors = {s.name.split()[-1]: [s.max_error, s.mean_error] for s in report.stages[1:]}
    covered = report.coverage
    return {
        "placed": True,
        "errors": errors,
        "integer": dict(covered.integer),
        "total": dict(covered.total),
    }


def page(found: dict[str, Any]) -> list[str]:
    """Which are placed, how they compared, and why others are refused."""
    placed = {name: facts for name, facts in found.items() if facts.get("placed")}
    refused = {name: facts for name, facts in found.items() if "refused" in facts}
    smaller = [
        f"`{name}` ({', '.join(f'{key}={value}' for key, value in SMALLER[name].items())})"
        for name in found
        if name in SMALLER
    ]
    compared = {name: facts for name, facts in placed.items() if "errors" in facts}
    lines = [
        "# Models of others",
        "",
        f"{len(placed)} of {len(found)} models, one of each family, are placed for ONNX Runtime at "
        "4 bits. Made by `python benchmarks/models.py --json docs/models.json`, with `--quick` "
        "where nothing was compared, then `--report docs/models.md`. Weights are random: nothing "
        "here says how accurate a model is.",
        "",
    ]
    if smaller:
        lines += [f"Made smaller by their own arguments: {', '.join(smaller)}.", ""]
    if compared:
        exact = sum(facts["errors"]["on"][0] == 0 for facts in compared.values())
        lines += [
            f"Logits of {COMPARED} images against the student's in its integers' arithmetic, in "
            "steps of the 8-bit output, without the runtime's optimisations (*off*), which sums in "
            f"float32, and as deployed (*on*): {exact} of {len(compared)} are the same bit for "
            "bit. Networks without trained weights amplify each difference.",
            "",
            "| model | pixels | in integers | off: max, mean | on: max, mean |",
            "|---|---:|---|---:|---:|",
            *(row(name, facts) for name, facts in compared.items()),
            "",
        ]
    alone = [name for name in placed if name not in compared]
    if alone:
        lines += [f"Placed, not compared: {', '.join(f'`{name}`' for name in alone)}.", ""]
    if refused:
        lines += ["Refused, each with the operator and line that has no form here:", ""]
        lines += [f"- `{name}`: {facts['refused']}" for name, facts in refused.items()]
    return [*lines, ""] if refused else lines


def row(name: str, facts: dict[str, Any]) -> str:
    """A model that was compared."""
    integer = facts["integer"]
    counts = ", ".join(f"{integer.get(kind, 0)}/{n} {kind}" for kind, n in facts["total"].items())
    errors = [f"{largest:.0f}, {mean:.2f}" for largest, mean in facts["errors"].values()]
    return f"| {' | '.join([name, str(facts['size']), counts, *errors])} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--quick", action="store_true", help="place only: no file, no comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
    for name in options.models:
        if name not in found:
            found[name] = tried(name, quick=options.quick)
            print(name, found[name], flush=True)
            write_text(options.json, json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    if options.report is not None:
        write_text(options.report, "\n".join(page(dict(sorted(found.items())))))


if __name__ == "__main__":
    main()
