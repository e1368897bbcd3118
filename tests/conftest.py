"""Fixtures of several test files: tiny random editors of every family, of the real classes."""

import inspect
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored: tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)  # so has a shell, in the background
tqdm.set_lock(threading.RLock())  # its own is shared by forks, and a killed one may hold it

WORDS = ["make", "the", "red", "circle", "blue", "remove", "square", "add", "green", "triangle"]


def tiny_tokenizers():
    """CLIP and T5 tokenizers out of one list of words, in memory."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = sorted(set("".join(WORDS)))
    pieces = letters + [letter + "</w>" for letter in letters]
    merges, known = [], set(pieces)
    for word in WORDS:
        left = word[0]
        for right in [*word[1:-1], word[-1] + "</w>"]:
            if left + right not in known:
                merges.append((left, right))
                known.add(left + right)
                pieces.append(left + right)
            left += right
    vocab = {piece: i for i, piece in enumerate(pieces + ["<|startoftext|>", "<|endoftext|>"])}
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    entries += [("▁" + word, -1.0) for word in WORDS]
    t5 = T5TokenizerFast(vocab=entries, extra_ids=0, model_max_length=12)
    return clip, t5, len(vocab)


def tiny_kontext(seed=0):
    """A random FluxKontextPipeline of the real classes: x4 VAE, 1 double and 1 single block."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip, t5, size = tiny_tokenizers()
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=8,
            sample_size=32,
            shift_factor=0.1,
            scaling_factor=0.9,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=32,
                eos_token_id=size - 1,
                bos_token_id=size - 2,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=32,
                d_kv=16,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


@pytest.fixture(scope="session")
def kontext_folder(tmp_path_factory):
    """The folder of a tiny random FLUX-Kontext editor for 32 x 32 pictures."""
    folder = tmp_path_factory.mktemp("kontext")
    pipe = tiny_kontext()
    make_louder(pipe.vae)
    pipe.save_pretrained(folder)
    return folder


def lora_layers(editor):
    """The layers of an editor that have a LoRA, in its order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in editor.transformer.modules() if isinstance(part, BaseTunerLayer)]


def make_louder(vae):
    """A random decoder paints one grey: makes its pictures differ."""
    vae.decoder.conv_out.weight.data *= 4


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Eight training rows, two with one prompt and other pictures, and two held-out ones."""
    from rule_judge import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(kontext_folder, dataset, tmp_path, monkeypatch):
    """run(out="a", **settings) trains with the rule judge, or goes on, and returns the folder."""
    from rule_judge import RuleJudge, arguments

    import train_nft

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(out="run", judge=None, **changes):
        monkeypatch.setattr(train_nft, "load_judge", lambda *args, **kwargs: judge or RuleJudge())
        train_nft.main(arguments(kontext_folder, dataset, tmp_path / out, resume="auto", **changes))
        return tmp_path / out

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- the other families

MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
MISTRAL_CHAT = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
)


def tiny_qwen_tokenizer(chat=CHAT, longest=40):
    """A Qwen2Tokenizer that knows the pipelines' templates by the word, as the real one does."""
    from diffusers.pipelines.flux2 import system_messages
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    modules = (pipeline_qwenimage_edit_plus, pipeline_longcat_image_edit, system_messages)
    known = [inspect.getsource(module) for module in modules]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator(known + [" ".join(WORDS)] * 3, trainer)
    model = json.loads(pieces.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], chat_template=chat
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    tokenizer.model_max_length = longest
    return tokenizer


def tiny_qwen_vl(tokenizer):
    """A random Qwen2_5_VLForConditionalGeneration and the picture half of its processor."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PictureProcessor(Qwen2_5_VLProcessor):  # its part for videos needs torchvision
        def check_argument_for_proper_class(self, name, value):
            if name != "video_processor":
                super().check_argument_for_proper_class(name, value)

    ids = {mark.strip("<|>"): tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=ids["endoftext"],
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 100.0},
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=32,
        out_hidden_size=32,
        fullatt_block_indexes=[0],
    )
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 4096},
    )
    return model, PictureProcessor(pictures, tokenizer)


def tiny_vae(cls, latent_channels=8, **kwargs):
    """A random convolutional VAE, x4."""
    vae = cls(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=latent_channels,
        sample_size=64,
        mid_block_add_attention=False,
        **kwargs,
    )
    make_louder(vae)
    return vae


def flow_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def tiny_qwen_edit(cls, zero_cond_t=False):
    """A random QwenImageEdit(Plus)Pipeline; zero_cond_t as in Qwen-Image-Edit-2511."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    tokenizer = tiny_qwen_tokenizer(longest=512)
    model, processor = tiny_qwen_vl(tokenizer)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 8,
        latents_std=[0.9] * 8,
    )
    make_louder(vae)
    transformer = QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    return cls(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=model,
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer,
    )


QWEN3_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tiny_qwen3_vl(tokenizer):
    """A random Qwen3VLForConditionalGeneration and the picture half of its processor."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PictureProcessor(Qwen3VLProcessor):  # its part for videos needs torchvision
        def check_argument_for_proper_class(self, name, value):
            if name != "video_processor":
                super().check_argument_for_proper_class(name, value)

    ids = {mark.strip("<|>"): tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=ids["endoftext"],
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "rope_theta": 100.0,
        },
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32**2, "longest_edge": 1024**2},
    )
    return model, PictureProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)


def tiny_qwen21(cls):
    """A random QwenImage21Pipeline with times of its own, as the released one has them: x16 VAE."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel

    model, processor = tiny_qwen3_vl(tiny_qwen_tokenizer(QWEN3_CHAT, longest=512))
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1] * 16,
        latents_std=[0.9] * 16,
    )
    make_louder(vae)
    transformer = QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return cls(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=model,
        processor=processor,
        transformer=transformer,
        sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    )


def tiny_longcat(cls):
    """A random LongCatImageEditPipeline."""
    from diffusers import AutoencoderKL, LongCatImageTransformer2DModel

    tokenizer = tiny_qwen_tokenizer()
    model, processor = tiny_qwen_vl(tokenizer)
    vae = tiny_vae(
        AutoencoderKL,
        16,
        shift_factor=0.1,
        scaling_factor=0.9,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
    )
    return cls(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=model,
        tokenizer=tokenizer,
        text_processor=processor,
        transformer=transformer,
    )


def tiny_flux2(cls, **kwargs):
    """A random Flux2(Klein)Pipeline; they read their encoder's 30th or 27th hidden layer."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    klein = cls.__name__.startswith("Flux2Klein")
    if klein:
        tokenizer = tiny_qwen_tokenizer(CHAT, longest=40)
    else:
        tokenizer = tiny_qwen_tokenizer(MISTRAL_CHAT, longest=80)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        head_dim=8,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    if klein:
        encoder = Qwen3ForCausalLM(Qwen3Config(**text, num_hidden_layers=27))
    else:
        vision = dict(
            model_type="pixtral",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=8,
            image_size=32,
            patch_size=8,
        )
        text |= {"model_type": "mistral", "num_hidden_layers": 30}
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=text,
                vision_config=vision,
                image_token_index=tokenizer.convert_tokens_to_ids(MARKS[5]),
            )
        )
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        mlp_ratio=1.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    return cls(
        scheduler=flow_scheduler(),
        vae=tiny_vae(AutoencoderKLFlux2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        **kwargs,
    )


def tiny_editor(name):
    """A tiny random pipeline: a class's name, perhaps with -2511 or -distilled."""
    import diffusers

    torch.manual_seed(0)
    kind, _, variant = name.partition("-")
    cls = getattr(diffusers, kind)
    if kind == "FluxKontextPipeline":
        pipe = tiny_kontext()
        make_louder(pipe.vae)
        return pipe
    if kind == "QwenImage21Pipeline":
        return tiny_qwen21(cls)
    if kind.startswith("Qwen"):
        return tiny_qwen_edit(cls, zero_cond_t=variant == "2511")
    if kind.startswith("Flux2Klein"):
        return tiny_flux2(cls, is_distilled=variant == "distilled")
    if kind == "Flux2Pipeline":
        return tiny_flux2(cls)
    return tiny_longcat(cls)


def save_editor(pipe, folder):
    """Saves a tiny pipeline as the released one of its class lies in its folder.

    The released processors cannot be built where torchvision is missing, so their halves are saved
    and model_index.json names the whole.
    """
    processors = {}
    for part in {"processor", "text_processor"} & set(pipe.components):
        processors[part] = getattr(pipe, part)
    pipe.register_modules(**dict.fromkeys(processors))
    pipe.save_pretrained(folder)
    pipe.register_modules(**processors)
    index = json.loads((folder / "model_index.json").read_text())
    for part, processor in processors.items():
        index[part] = ["transformers", type(processor).__mro__[1].__name__]
        processor.image_processor.save_pretrained(folder / part)
        processor.tokenizer.save_pretrained(folder / part)
    if type(pipe).__name__ == "Flux2Pipeline":
        index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory):
    """A function from a name as tiny_editor takes it to that pipeline's folder, built once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            save_editor(tiny_editor(name), folders[name])
        return folders[name]

    return folder_of
