"""Architectures in small sizes with random weights, and how to read the output of each of their modules.

A reading is written by hand from the source of the architecture. Each line has a layout and the names (shell patterns) of
the modules that have it; the first line that matches a name counts. In a layout ``B`` is the axis of the samples, ``C`` that
of the features, and any other letter a position, over which the features are averaged. ``maybe`` marks a layout that the
architecture leaves open; such a module may be left out. ``left out`` gives the reason why a module has no features.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLASSES = 4
BATCH = 8
COUNT = 22  # the last batch is smaller


@dataclass(frozen=True)
class Architecture:
    """A model, the samples it takes, and the layout of each of its modules."""

    name: str
    build: Callable[[], nn.Module]
    samples: Callable[[], list[Any]]
    reading: tuple[tuple[str, str], ...]

    def layout(self, module: str) -> str:
        """The layout on the first line that names the module."""
        return next(layout for layout, pattern in self.reading if fnmatch.fnmatchcase(module, pattern))

    def model(self) -> nn.Module:
        """The model in float64 and eval mode, with weights large enough that a wrong axis shows in the numbers."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                width = parameter[:1].numel()
                if parameter.dim() < 2:  # biases, and scales of layers that start near zero
                    parameter += 0.2 * torch.randn_like(parameter)
                elif parameter.std() < width**-0.5:
                    parameter.normal_(0, width**-0.5)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
        return model


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(samples: Callable[[], list[Any]], reading: str) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a function that builds a model, under its name."""
    lines = [line.rsplit(" : ", 1) for line in reading.strip().splitlines()]
    parsed = tuple((layout.strip(), pattern) for layout, patterns in lines for pattern in patterns.split())

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        ARCHITECTURES[name] = Architecture(name, build, samples, parsed)
        return build

    return register


def labels(count: int = COUNT) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)) % CLASSES


def arrays(*shape: int, count: int = COUNT) -> list[tuple[Tensor, Tensor]]:
    """A pattern per class, and noise."""
    generator, target = torch.Generator().manual_seed(2), labels(count)
    patterns = torch.randn(CLASSES, *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return list(zip(patterns[target] + 0.7 * noise, target, strict=True))


def images(size: int) -> Callable[[], list[Any]]:
    return partial(arrays, 3, size, size)


def named_arrays(name: str, *shape: int) -> list[dict[str, Tensor]]:
    return [{name: array, "labels": target} for array, target in arrays(*shape)]


def sentences(length: int = 11, count: int = COUNT) -> list[dict[str, Tensor]]:
    """As a tokenizer leaves them: each class has words of its own; of several lengths, padded at the right."""
    generator, target = torch.Generator().manual_seed(3), labels(count)
    words = torch.randint(0, 16, (count, length), generator=generator) + 5 + 8 * target[:, None]
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator)
    masks = (torch.arange(length) < lengths[:, None]).long()
    rows = zip(words * masks, masks, target, strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in rows]


# torchvision, images: maps (B, C, H, W) unless said otherwise

MAPS_AND_FC = """
    B C     : fc
    B C H W : *
"""
MAPS_AND_CLASSIFIER = """
    B C     : classifier classifier.*
    B C H W : *
"""


@architecture(images(28), MAPS_AND_FC)
def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


@architecture(images(36), MAPS_AND_FC)
def resnext():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=4)


@architecture(images(36), MAPS_AND_FC)
def wide_resnet():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, width_per_group=32)


@architecture(
    images(36),
    """
    B H W C : *.block.1 *.block.2 *.block.3 *.block.4 *.block.5
    B C     : classifier classifier.1 classifier.2
    B C H W : *
    """,
)
def convnext():
    """A block goes to channels last (block.1) for its LayerNorm and Linear layers, and back (block.6)."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(12, 20, 1), CNBlockConfig(20, None, 2)], num_classes=CLASSES)


SWIN = """
    B C H W                     : features.0.0 permute avgpool
    B C                         : flatten head
    left out, no row per sample : *.cpb_mlp *.cpb_mlp.*
    B H W C                     : *
"""


@architecture(images(28), SWIN)
def swin():
    """Channels last behind the patches; the windows lie inside one function, so that no module gives them."""
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 12, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


@architecture(images(28), SWIN)
def swin_v2():
    """The perceptron cpb_mlp turns relative coordinates, not samples, into a bias of the attention."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([2, 2], 12, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **parts)


@architecture(
    images(28),
    """
    B C H W : conv_proj
    B C     : heads heads.*
    B T C   : *
    """,
)
def vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(28, 7, 2, 2, 12, 24, num_classes=CLASSES)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def efficientnet():
    from torchvision.models.efficientnet import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig as Block

    blocks = [Block(1, 3, 1, 8, 8, 1), Block(6, 3, 2, 8, 12, 2), Block(6, 5, 2, 12, 20, 1)]
    return EfficientNet(blocks, 0.1, num_classes=CLASSES, last_channel=40)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def efficientnet_v2():
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    fused = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 1)]
    return EfficientNet([*fused, MBConvConfig(4, 3, 2, 16, 20, 2)], 0.1, num_classes=CLASSES, last_channel=40)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def mobilenet_v2():
    from torchvision.models import MobileNetV2

    return MobileNetV2(CLASSES, width_mult=0.25)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def mobilenet_v3():
    from torchvision.models.mobilenetv3 import InvertedResidualConfig as Block
    from torchvision.models.mobilenetv3 import MobileNetV3

    first, second = Block(8, 3, 8, 8, True, "RE", 2, 1, 1.0), Block(8, 3, 24, 12, False, "HS", 2, 1, 1.0)
    return MobileNetV3([first, second, Block(12, 5, 36, 12, True, "HS", 1, 1, 1.0)], 40, CLASSES)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def densenet():
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES)


@architecture(
    images(36),
    """
    B C     : dropout fc
    B C H W : *
    """,
)
def googlenet():
    """Its auxiliary heads are not called in eval mode."""
    from torchvision.models import GoogLeNet

    return GoogLeNet(CLASSES, init_weights=False)


@architecture(images(44), "B C H W : *")
def squeezenet():
    """The classifier is a convolution, a ReLU and a mean over positions."""
    from torchvision.models import SqueezeNet

    return SqueezeNet("1_1", CLASSES)


@architecture(images(72), MAPS_AND_FC)
def shufflenet():
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 40], CLASSES)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def vgg11_bn():
    from torchvision.models.vgg import VGG, make_layers

    model = VGG(make_layers([8, "M", 12, "M", 16, 16, "M"], batch_norm=True), CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(64, 24),
        nn.Linear(24, 20),
        nn.Linear(20, 4),
    )
    return model


@architecture(images(68), MAPS_AND_CLASSIFIER)
def alexnet():
    from torchvision.models import AlexNet

    model = AlexNet(CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[1], model.classifier[4], model.classifier[6] = (
        nn.Linear(256, 24),
        nn.Linear(24, 20),
        nn.Linear(20, 4),
    )
    return model


@architecture(images(36), MAPS_AND_FC)
def regnet():
    from torchvision.models.regnet import BlockParams, RegNet

    blocks = BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(blocks, CLASSES, stem_width=8)


@architecture(images(36), MAPS_AND_CLASSIFIER)
def mnasnet():
    from torchvision.models import MNASNet

    return MNASNet(0.25, CLASSES)


@architecture(
    images(24),
    """
    B C H W : *.departition_op
    B G P C : *.partition_op *.partition_swap *.departition_swap *.stochastic_dropout *.attn_layer* *.mlp_layer*
    B C     : classifier classifier.[1-5]
    B C H W : *
    """,
)
def maxvit():
    """Its windows G are an axis of their own: (B, G, P, C), so that each sample keeps its row."""
    from torchvision.models import MaxVit

    return MaxVit((24, 24), 8, 3, [12, 20], [1, 1], 4, 0.0, num_classes=CLASSES)


@architecture(
    partial(arrays, 3, 4, 20, 20),
    """
    B C       : fc
    B C D H W : *
    """,
)
def video_resnet():
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, CLASSES)


@architecture(
    partial(arrays, 3, 4, 28, 28),
    """
    B C D H W : patch_embed.proj avgpool
    B C       : head
    B D H W C : *
    """,
)
def video_swin():
    from torchvision.models.video import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 4], [2, 3, 3], num_classes=CLASSES)


# timm, images


@architecture(
    images(28),
    """
    B C H W     : stem.proj
    maybe B P C : *.mlp_tokens *.mlp_tokens.*
    B C         : head_drop head
    B T C       : *
    """,
)
def mixer():
    """The tokens are mixed on the transposed features (B, C, T): the units of those layers are tokens, each channel P is a
    position to them. A reader may expect the channels of the block instead, so they may be left out."""
    mixers = pytest.importorskip("timm.models.mlp_mixer")
    return mixers.MlpMixer(CLASSES, 28, patch_size=7, embed_dim=12, num_blocks=2)


@architecture(
    images(28),
    """
    B C H W     : stem.proj
    maybe B P C : *.linear_tokens
    B C         : head_drop head
    B T C       : *
    """,
)
def resmlp():
    mixers = pytest.importorskip("timm.models.mlp_mixer")
    parts = {"block_layer": mixers.ResBlock, "norm_layer": mixers.Affine}
    return mixers.MlpMixer(CLASSES, 28, patch_size=7, embed_dim=12, num_blocks=2, mlp_ratio=4, **parts)


@architecture(
    images(28),
    """
    B C H W     : stem.proj
    maybe B P C : *.gate.proj
    B C         : head_drop head
    B T C       : *
    """,
)
def gmlp():
    mixers = pytest.importorskip("timm.models.mlp_mixer")
    parts = {"block_layer": mixers.SpatialGatingBlock, "mlp_layer": mixers.GatedMlp}
    return mixers.MlpMixer(CLASSES, 28, patch_size=7, embed_dim=12, num_blocks=2, mlp_ratio=6, **parts)


@architecture(
    images(28),
    """
    B C H W       : patch_embed.proj
    maybe B N T C : *.q_norm *.k_norm
    B C           : fc_norm head_drop head
    B T C         : *
    """,
)
def deit():
    """The queries and keys are split into heads N, which are positions to a norm of one head's features."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, **sizes)


@architecture(
    images(68),
    """
    B H W C : *.blocks.*.norm *.mlp *.mlp.*
    B C     : head head.flatten head.pre_logits head.drop head.fc
    B C H W : *
    """,
)
def timm_convnext():
    """Channels last inside a block, without a module that transposes."""
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_tiny", num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(12, 16, 20, 24))


@architecture(
    images(68),
    """
    B C     : head.flatten head.drop head.fc
    B C H W : *
    """,
)
def poolformer():
    formers = pytest.importorskip("timm.models.metaformer")
    sizes = {"num_classes": CLASSES, "depths": (1, 1, 1, 1), "dims": (12, 16, 20, 24)}
    norms = {"downsample_norm": None, "norm_layers": formers.GroupNorm1, "layer_scale_init_values": 1e-5}
    parts = {"mlp_act": nn.GELU, "mlp_bias": True, "res_scale_init_values": None, "use_mlp_head": False}
    return formers.MetaFormer(**sizes, **norms, **parts)


@architecture(
    images(100),
    """
    B T C   : stages.2.blocks* stages.3.blocks*
    B C     : head head.flatten head.drop head.fc head.fc.*
    B C H W : *
    """,
)
def caformer():
    """Convolutions, then attention: the last two stages flatten the map for their blocks, and unflatten it."""
    formers = pytest.importorskip("timm.models.metaformer")
    mixers = [formers.SepConv, formers.SepConv, formers.Attention, formers.Attention]
    norms = [formers.LayerNorm2dNoBias] * 2 + [formers.LayerNormNoBias] * 2
    sizes = {"num_classes": CLASSES, "depths": (1, 1, 1, 1), "dims": (12, 16, 32, 64)}
    return formers.MetaFormer(**sizes, token_mixers=mixers, norm_layers=norms)


@architecture(
    images(64),
    """
    B C H W                               : stem stem.*
    left out, the rows are all the tokens : stages.[01].*.bn stages.2.*.kv.bn
    B C                                   : stages.2.*.bn head head.* head_dist head_dist.*
    B T C                                 : *
    """,
)
def levit():
    """A batch norm sees (B T, C); in the last stage there is one token a sample."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 64, "embed_dim": (20, 24, 32), "key_dim": 5, "num_heads": (2, 3, 4), "depth": (1, 1, 1)}
    return timm.create_model("levit_128s", num_classes=CLASSES, **sizes)


POOLED_HEAD = """
    B C     : head head.global_pool head.global_pool.flatten head.drop head.fc head.flatten
    B C H W : *
"""


@architecture(images(64), POOLED_HEAD)
def coatnet():
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=4)
    sizes = {"embed_dim": (12, 16, 20), "depths": (1, 1, 2), "stem_width": (8, 8)}
    parts = maxxvit.MaxxVitCfg(block_type=("C", "C", "T"), transformer_cfg=attention, **sizes)
    return maxxvit.MaxxVit(parts, 64, num_classes=CLASSES)


@architecture(
    images(32),
    """
    left out, the rows are windows : stages.0.*.attn stages.0.*.attn.*
    B H W C                        : *.attn_block *.attn_block.* *.attn_grid *.attn_grid.*
    """
    + POOLED_HEAD.strip(),
)
def timm_maxvit():
    """Four windows in the first stage, one in the second, where each sample keeps its row."""
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4))
    sizes = {"embed_dim": (12, 16), "depths": (1, 1), "stem_width": (8, 8)}
    parts = maxxvit.MaxxVitCfg(block_type=("M", "M"), transformer_cfg=attention, **sizes)
    return maxxvit.MaxxVit(parts, 32, num_classes=CLASSES)


@architecture(
    images(28),
    """
    B C H W                        : patch_embed.proj
    left out, attention weights    : *.attn_drop *.softmax
    left out, the rows are windows : layers.0.*.attn layers.0.*.attn.*
    B T C                          : *.attn *.attn.* *.norm2 *.mlp *.mlp.* *.drop_path2
    B C                            : head head.*
    B H W C                        : *
    """,
)
def timm_swin():
    """A block flattens the positions for its perceptron; the last stage is one window."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 28, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, window_size=7, **sizes)


@architecture(
    images(32),
    """
    left out, no row per sample : pos_embed.token_projection
    left out, attention weights : *.attn_drop
    B C H W                     : patch_embed.proj patch_embed.proj.* pos_embed *.local_mp.*
    B C                         : *.attn.q head_drop head
    B T C                       : *
    """,
)
def xcit():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "xcit_nano_12_p16_224", num_classes=CLASSES, img_size=32, embed_dim=16, depth=1, num_heads=2
    )


@architecture(
    images(36),
    """
    B C     : global_pool global_pool.flatten head_drop head
    B C H W : *
    """,
)
def convmixer():
    mixers = pytest.importorskip("timm.models.convmixer")
    return mixers.ConvMixer(12, 2, 3, 4, num_classes=CLASSES)


@architecture(
    images(64),
    """
    left out, the rows are patches : stages.?.1.transformer stages.?.1.transformer.* stages.?.1.norm
    B C                            : head head.global_pool head.global_pool.flatten head.drop head.fc head.flatten
    B C H W                        : *
    """,
)
def mobilevit():
    """The transformer inside a block sees (B P, N, C), where P counts the pixels of a patch."""
    timm = pytest.importorskip("timm")
    return timm.create_model("mobilevit_xxs", num_classes=CLASSES)


# transformers: text (the mean leaves out what the attention mask does), images, sound

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "num_labels": CLASSES, "pad_token_id": 0}
IMAGE = {"image_size": 28, "num_labels": CLASSES}
PIXELS = partial(named_arrays, "pixel_values", 3, 28, 28)


def of_transformers(name: str, **config: Any) -> nn.Module:
    kind = getattr(pytest.importorskip("transformers"), name)
    return kind(kind.config_class(**config))


BERT = """
    left out, no row per sample : *.position_embeddings
    B C                         : *.pooler *.pooler.* *.pooler_activation dropout classifier
    B T C                       : *
"""


@architecture(sentences, BERT)
def bert():
    return of_transformers("BertForSequenceClassification", **TEXT, **WIDTHS)


@architecture(partial(sentences, 8, 24), BERT)
def bert_square():
    """Sentences as long as the batch has samples."""
    return of_transformers("BertForSequenceClassification", **TEXT, **WIDTHS)


@architecture(sentences, BERT)
def albert():
    """One layer, called twice."""
    return of_transformers("AlbertForSequenceClassification", **TEXT, **WIDTHS, embedding_size=12)


@architecture(
    sentences,
    """
    left out, no row per sample : *.position_embeddings
    B C                         : pre_classifier dropout classifier
    B T C                       : *
    """,
)
def distilbert():
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    return of_transformers("DistilBertForSequenceClassification", **TEXT, **sizes)


@architecture(
    sentences,
    """
    B C   : classifier classifier.*
    B T C : *
    """,
)
def roberta():
    """Positions are counted without the padding, so each sample has its own."""
    return of_transformers("RobertaForSequenceClassification", **TEXT, **WIDTHS)


@architecture(
    sentences,
    """
    left out, no row per sample : *.wpe
    B T C                       : *
    """,
)
def gpt2():
    """Its layers of class Conv1D are linear layers on (B, T, C)."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return of_transformers("GPT2ForSequenceClassification", **TEXT, **sizes)


@architecture(
    sentences,
    """
    left out, no row per sample : *.rotary_emb
    B T C                       : *
    """,
)
def llama():
    return of_transformers("LlamaForSequenceClassification", **TEXT, **WIDTHS)


@architecture(
    sentences,
    """
    B C   : sequence_summary sequence_summary.* logits_proj
    B T C : transformer
    T B C : *
    """,
)
def xlnet():
    """Sequence first inside. One dropout sees the attention weights (B, N, T, T) and then the features (T, B, C)."""
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    return of_transformers("XLNetForSequenceClassification", **TEXT, **sizes)


class T5Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        self.encoder = of_transformers("T5EncoderModel", vocab_size=50, pad_token_id=0, **sizes)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        return self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


T5 = """
    left out, no row per sample : *.relative_attention_bias
    B C                         : head
    B T C                       : *
"""


@architecture(sentences, T5)
def t5():
    return T5Classifier()


@architecture(partial(sentences, 8, 24), T5)
def t5_square():
    """The bias of the attention (T, T, N) has as many rows as there are samples."""
    return T5Classifier()


@architecture(
    PIXELS,
    """
    B C H W : *.projection
    B C     : classifier
    B T C   : *
    """,
)
def transformers_vit():
    return of_transformers("ViTForImageClassification", **IMAGE, **WIDTHS, patch_size=7)


@architecture(
    PIXELS,
    """
    left out, no row per sample    : *.relative_position_bias
    left out, the rows are windows : *.layers.0.*.attention *.layers.0.*.attention.*
    B C H W                        : *.projection
    B C T                          : swin.pooler
    B C                            : classifier
    B T C                          : *
    """,
)
def transformers_swin():
    """Maps are sequences (B, H W, C) here; one dropout sees windows and then the sequence; the last stage is one window."""
    sizes = {"patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}
    return of_transformers("SwinForImageClassification", **IMAGE, **sizes)


@architecture(
    PIXELS,
    """
    B H W C : *.layers.*.layernorm *.pwconv1 *.pwconv2 *.act
    B C     : convnext.layernorm classifier
    B C H W : *
    """,
)
def transformers_convnext():
    """Norms of one class work on channels first and on channels last."""
    sizes = {"hidden_sizes": [12, 20], "depths": [1, 2], "num_stages": 2}
    return of_transformers("ConvNextForImageClassification", **IMAGE, **sizes)


@architecture(
    partial(named_arrays, "pixel_values", 3, 36, 36),
    """
    B C H W : segformer segformer.stages.? *.proj *.sequence_reduction.sequence_reduction *.dwconv.dwconv
    B C     : classifier
    B T C   : *
    """,
)
def segformer():
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [12, 16], "num_attention_heads": [2, 2]}
    patches = {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return of_transformers(
        "SegformerForImageClassification", num_labels=CLASSES, decoder_hidden_size=8, **sizes, **patches
    )


@architecture(
    partial(named_arrays, "input_values", 400),
    """
    left out, no row per sample : *.parametrizations.*
    B C T : *.feature_extractor *.feature_extractor.* *.pos_conv_embed.conv *.pos_conv_embed.padding *.pos_conv_embed.activation
    B C   : classifier
    B T C : *
    """,
)
def wav2vec2():
    """Convolutions over time, then a transformer, with a convolution between."""
    convolutions = {"conv_dim": (8, 12), "conv_kernel": (5, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    embedding = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    sizes = {"num_labels": CLASSES, **WIDTHS, **convolutions, **embedding}
    return of_transformers("Wav2Vec2ForSequenceClassification", **sizes)


@architecture(
    partial(named_arrays, "input_features", 10, 40),
    """
    B C T                       : encoder.conv?
    left out, no row per sample : encoder.embed_positions
    B C                         : classifier
    B T C                       : *
    """,
)
def whisper():
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "max_source_positions": 20}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_start_token_id": 1}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"num_labels": CLASSES, "d_model": 16, "num_mel_bins": 10, "classifier_proj_size": 8}
    return of_transformers("WhisperForAudioClassification", **sizes, **encoder, **decoder, **tokens)


@architecture(
    sentences,
    """
    left out, no row per sample : *.position_embeddings
    maybe B C                   : base_model base_model.model
    B C                         : *.pooler *.pooler.* *.model.dropout *.model.classifier *.model.classifier.*
    B T C                       : *
    """,
)
def lora_bert():
    """The outer wrappers return the loss before the logits."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], lora_dropout=0.1)
    return peft.get_peft_model(of_transformers("BertForSequenceClassification", **TEXT, **WIDTHS), config)


# written here


class ResBlock1D(nn.Module):
    """The name ends in 1D, and its output is (B, C, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels)
        self.act, self.conv2 = nn.ReLU(), nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.norm(self.conv1(x))))


class Transposed(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *self.axes)


def convnet_1d(channels: int) -> nn.Module:
    stem = nn.Sequential(nn.Conv1d(3, channels, 5, padding=2), nn.ReLU(), nn.BatchNorm1d(channels))
    body = nn.Sequential(ResBlock1D(channels), nn.ReLU(), nn.GroupNorm(2, channels), nn.Dropout(0.1))
    mixer = nn.Sequential(Transposed(2, 1), nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
    head = nn.Sequential(Transposed(2, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(stem, body, mixer, head)


CONVNET_1D = """
    B C T : 0 0.* 1 1.* 3.0 3.1
    B T C : 2 2.*
    B C   : 3 3.*
"""


@architecture(partial(arrays, 3, 30), CONVNET_1D)
def conv1d():
    return convnet_1d(12)


@architecture(partial(arrays, 3, 12), CONVNET_1D)
def conv1d_square():
    """As many positions as channels."""
    return convnet_1d(12)


class Recurrent(nn.Module):
    """Takes (B, T, 5). Sequence first, all but the head works on (T, B, C)."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, **arguments: Any) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.project = nn.Linear(5, 10)
        self.rnn = kind(10, 12, batch_first=batch_first, **arguments)
        width = 24 if arguments.get("bidirectional") else 12
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.rnn(self.project(x if self.batch_first else x.transpose(0, 1)))[0])
        return self.head(x[:, -1] if self.batch_first else x[-1])


BATCH_FIRST = """
    B C   : head
    B T C : *
"""
SEQUENCE_FIRST = """
    B C   : head
    T B C : *
"""


@architecture(partial(arrays, 11, 5), BATCH_FIRST)
def lstm():
    return Recurrent(nn.LSTM, batch_first=True)


@architecture(partial(arrays, 11, 5), BATCH_FIRST)
def gru():
    return Recurrent(nn.GRU, batch_first=True, bidirectional=True, num_layers=2)


@architecture(partial(arrays, 11, 5), SEQUENCE_FIRST)
def lstm_sequence_first():
    return Recurrent(nn.LSTM, batch_first=False)


@architecture(partial(arrays, 8, 5, count=24), SEQUENCE_FIRST)
def lstm_square():
    """Sequence first, and as many steps as the batch has samples."""
    return Recurrent(nn.LSTM, batch_first=False)


@architecture(partial(arrays, 8, 5, count=24), BATCH_FIRST)
def lstm_square_batch_first():
    return Recurrent(nn.LSTM, batch_first=True)


class TorchTransformer(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(5, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x if self.batch_first else x.transpose(0, 1)))
        return self.head(x.mean(1 if self.batch_first else 0))


@architecture(partial(arrays, 11, 5), BATCH_FIRST)
def torch_transformer():
    return TorchTransformer(batch_first=True)


@architecture(partial(arrays, 11, 5), SEQUENCE_FIRST)
def torch_transformer_sequence_first():
    return TorchTransformer(batch_first=False)


@architecture(partial(arrays, 8, 5, count=24), SEQUENCE_FIRST)
def torch_transformer_square():
    return TorchTransformer(batch_first=False)


@architecture(
    partial(arrays, 2, 6, 9, 9),
    """
    B C       : [5-7]
    B C D H W : *
    """,
)
def conv3d():
    body = [nn.Conv3d(2, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 10), nn.Linear(10, CLASSES))


class GraphNet(nn.Module):
    """Every sample is a graph of five nodes; the layers see the nodes of all graphs as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.LayerNorm(12))
        self.readout, self.head = nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, graphs: Tensor) -> Tensor:
        nodes = self.nodes(graphs.flatten(0, 1))
        return self.head(self.readout(nodes.unflatten(0, graphs.shape[:2]).sum(1)))


@architecture(
    partial(arrays, 5, 6),
    """
    left out, the rows are nodes : nodes nodes.*
    B C                          : *
    """,
)
def graph():
    return GraphNet()


class ChannelsFirstNorm(nn.LayerNorm):
    """Normalizes the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@architecture(
    partial(arrays, 3, 12, 12),
    """
    B C H W : 0 0.* 2.0
    B H W C : 1 1.*
    B C     : 2 2.*
    """,
)
def conv2d_square():
    """As many rows and columns as channels, first and last."""
    first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), ChannelsFirstNorm(12))
    last = nn.Sequential(Transposed(2, 3, 1), nn.Linear(12, 12), nn.GELU(), nn.LayerNorm(12))
    head = nn.Sequential(Transposed(3, 1, 2), nn.Flatten(), nn.Linear(12**3, 10), nn.Linear(10, CLASSES))
    return nn.Sequential(first, last, head)


@architecture(partial(arrays, 6), "B C : *")
def perceptron():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.BatchNorm1d(12), nn.Linear(12, CLASSES))
