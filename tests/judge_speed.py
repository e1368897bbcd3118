"""Pictures per second of a local judge: a group at once against one edit at a time by generate.

    python tests/judge_speed.py [--judge data/toy/judge] [--layers 2] [--group 12]

The Qwen2.5-VL has the 3B model's widths, heads, vocabulary, patches and windows, random weights
and fewer layers.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_prep import new_tokenizer, seeded  # noqa: E402
from reward_mllm import (  # noqa: E402
    DIGITS,
    JudgeSettings,
    _answer_token_ids,
    _message,
    _shrunk,
    expected_score,
    load_judge,
)


def save_realistic_judge(folder, layers, share=1):
    """A Qwen2.5-VL of the 3B model's shape, `layers` layers of text and of vision, narrower."""
    tokenizer = new_tokenizer()
    ids = {
        word: tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for word in ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = dict(
        vocab_size=151936,
        hidden_size=2048 // share,
        intermediate_size=11008 // share,
        num_hidden_layers=layers,
        num_attention_heads=16 // share,
        num_key_value_heads=max(1, 2 // share),
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
    )
    vision = dict(
        depth=layers,
        hidden_size=1280 // share,
        intermediate_size=3420 // share,
        num_heads=16 // share,
        patch_size=14,
        window_size=112,
        out_hidden_size=2048 // share,
        fullatt_block_indexes=[layers - 1],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    ).save_pretrained(folder)


def picture(size, *key):
    """A blotchy picture; size: (width, height)."""
    small = (torch.rand(8, 8, 3, generator=seeded("speed", *key)) * 255).byte().numpy()
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@torch.no_grad()
def one_at_a_time(judge, row, source, edits):
    """What a plain loop does: each edit's whole prompt and pictures through generate."""
    scores = []
    for edit in edits:
        question, ending = judge.question(row, "execution", "", judge.strategy)
        parts = [question, judge.part(source), judge.part(edit), ending]
        inputs = judge.inputs([[_message("user", *parts)]])
        made = judge.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        p = made.logits[0][0].float().softmax(0)[_answer_token_ids(judge.tokenizer)].tolist()
        scores.append(expected_score(dict(zip(DIGITS, p, strict=True))).score)
    return torch.tensor(scores)


def compare(name, folder, source_size, edit_size, group, times):
    judge = load_judge(JudgeSettings(judge=f"local:{folder}", judge_batch=group))
    row = {"prompt": "make the blue triangle yellow", "task": "adjust"}
    source, edits = picture(source_size, "source"), [picture(edit_size, i) for i in range(group)]
    shown = _shrunk(source, edits[0])
    one_at_a_time(judge, row, shown, edits[:1])  # warm
    slow = fast = 0.0
    for _ in range(times):  # the best of some: another process may take the cores for a while
        start = time.perf_counter()
        singly = one_at_a_time(judge, row, shown, edits)
        middle = time.perf_counter()
        together = judge.score(row, [source], edits).score
        end = time.perf_counter()
        slow = max(slow, group / (middle - start))
        fast = max(fast, group / (end - middle))
    sizes = ["{} x {}".format(*size) for size in (source_size, edit_size)]
    difference = (singly - together).abs().max().item()
    print(
        f"{name:<28} {sizes[0]:>11} {sizes[1]:>9} {slow:>12.3f} {fast:>10.3f} "
        f"{fast / slow:>7.1f} {difference:>11.1e}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", default="data/toy/judge", help="the toy judge's folder")
    parser.add_argument("--layers", type=int, default=2, help="layers of text and of vision")
    parser.add_argument("--share", type=int, default=1, help="divides the widths")
    parser.add_argument("--group", type=int, default=12, help="edits in a group")
    parser.add_argument(
        "--times", type=int, default=2, help="runs of each, of which the best counts"
    )
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, group of {args.group}; pictures per second")
    print(f"{'judge':<28}      source      edit one at a time as a group  factor  difference")
    compare("toy judge", args.judge, (32, 32), (32, 32), args.group, 10 * args.times)
    with tempfile.TemporaryDirectory() as folder:
        save_realistic_judge(folder, args.layers, args.share)
        for source, edit in (
            ((512, 512), (512, 512)),
            ((1024, 1024), (512, 512)),
            ((1536, 1024), (624, 416)),
        ):
            compare(
                f"Qwen2.5-VL, {args.layers} + {args.layers} layers",
                folder,
                source,
                edit,
                args.group,
                args.times,
            )


if __name__ == "__main__":
    main()
