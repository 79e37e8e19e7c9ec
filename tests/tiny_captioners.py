"""Captioning models of the real architectures with a few thousand random weights, saved as users have them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.utils import logging

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "blue", "house", "of", "on", "hill"]
SIDE = 32
TAGS = "tag_id,name,category,count\n9,general,9,5\n1,1girl,0,9\n2,red_hair,0,8\n3,^_^,0,7\n4,some_hero_(series),4,6\n"


def write_tiny_blip(folder: Path, *, word: str | None = None) -> Path:
    """BLIP with a vocabulary of ``WORDS``; with ``word``, its decoder says only that."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"encoder_hidden_size": 16, "max_position_embeddings": 96, "vocab_size": len(WORDS), "projection_dim": 16}
    marks = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**sizes, **text, **marks},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 16},
        projection_dim=16,
    )
    model = BlipForConditionalGeneration(config)
    if word is not None:
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[WORDS.index(word)] = 100.0
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={name: number for number, name in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    return folder


def write_tiny_florence(folder: Path) -> Path:
    """Florence-2 that spells letter by letter."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *bytes_to_unicode().values()]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    vision = Florence2VisionConfig(
        depths=[1],
        patch_size=[7],
        patch_stride=[4],
        patch_padding=[3],
        patch_prenorm=[False],
        embed_dim=[16],
        num_heads=[2],
        num_groups=[2],
        window_size=4,
        projection_dim=16,
        max_temporal_embeddings=10,
        max_position_embeddings=10,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=200,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image_token)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        # Make a readable letter the most likely one, whatever the random weights prefer.
        model.model.language_model.shared.weight[vocabulary["x"]] *= 3
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // 4) ** 2 + 1
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder
