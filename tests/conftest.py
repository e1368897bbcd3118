"""Fixtures that several test files share."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)

WORDS = "make the red circle blue remove square add green triangle".split()


def tiny_tokenizers():
    """CLIP and T5 tokenizers out of one list of words, in memory."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = sorted(set("".join(WORDS)))
    pieces = letters + [letter + "</w>" for letter in letters]
    merges, known = [], set(pieces)
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + "</w>" * (i == len(word))
            if left + right not in known:
                merges.append((left, right))
                known.add(left + right)
                pieces.append(left + right)
            left += right
    vocab = {piece: i for i, piece in enumerate(pieces + ["<|startoftext|>", "<|endoftext|>"])}
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)] + [("▁" + word, -1.0) for word in WORDS]
    t5 = T5TokenizerFast(vocab=entries, extra_ids=0, model_max_length=12)
    return clip, t5, len(vocab)


def tiny_kontext(seed=0):
    """A random FluxKontextPipeline of the real classes: x4 VAE, 8 latent channels, 1 double and 1 single block."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip, t5, size = tiny_tokenizers()
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=8, sample_size=32,
            shift_factor=0.1, scaling_factor=0.9, mid_block_add_attention=False, use_quant_conv=False,
            use_post_quant_conv=False),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=32, eos_token_id=size - 1, bos_token_id=size - 2)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=len(t5), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu")),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def kontext_folder(tmp_path_factory):
    """The folder of a tiny random FLUX-Kontext editor for 32 x 32 pictures."""
    folder = tmp_path_factory.mktemp("kontext")
    pipe = tiny_kontext()
    pipe.vae.decoder.conv_out.weight.data *= 4  # a random decoder paints one grey: make its pictures differ
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Eight training rows, two with one prompt and other pictures, and two held-out ones."""
    from rule_judge import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(kontext_folder, dataset, tmp_path, monkeypatch):
    """run(out="a", **settings) calls main with the rule judge and returns the run's folder; goes on where it holds one."""
    import train_nft
    from rule_judge import RuleJudge, arguments

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(out="run", judge=RuleJudge(), **changes):
        monkeypatch.setattr(train_nft, "load_judge", lambda *args: judge)
        train_nft.main(arguments(kontext_folder, dataset, tmp_path / out, resume="auto", **changes))
        return tmp_path / out

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
