"""The page about kohya's configurations: ``python -m sdlora.config.kohya_reference > docs/from-kohya.md``."""

from __future__ import annotations

from collections.abc import Iterator

from .kohya_names import ELSEWHERE, UNNECESSARY
from .kohya_rules import HARMLESS, KOHYA_DEFAULTS, RULES
from .kohya_training import same_settings
from .toml_text import toml_value

_EXAMPLE = (
    'sdlora train --from-kohya "accelerate launch train_network.py --train_data_dir datasets/pixel '
    "--caption_extension .txt --resolution 128 --network_module networks.lora --network_dim 8 --network_alpha 8 "
    "--learning_rate 1e-3 --network_train_unet_only --lr_scheduler cosine --max_train_steps 100 --output_dir out "
    '--output_name from-kohya" --trigger pixgrid'
)
_ABOUT = """\
# From kohya's trainer

<!-- Generated: python -m sdlora.config.kohya_reference > docs/from-kohya.md -->

`--from-kohya` takes a configuration of kohya's trainer (sd-scripts) in place of one of ours: its TOML file
(`--config_file`), a configuration that kohya_ss saved as JSON, a command line, or a text file with one. Our options and
`section.key=value` override it. The trigger word is added: kohya's trainer has none.

```console
$ {example}
```

Every option is translated, left out with a line that says why, or refused by its name; all refusals are listed at once.
`--explain` shows each setting with the option that it comes from. Paths go by the working folder, as in kohya's trainer.
The modules are those that its `networks.lora` trains; random numbers are our own, so images differ in detail. During the
warm-up the learning rate is at most one step ahead of kohya's.
"""


def kohya_markdown() -> str:
    """The page ``docs/from-kohya.md``."""
    return "\n".join([_ABOUT.format(example=_EXAMPLE), *_translated(), *_defaults(), *_left_out(), *_refused(), ""])


def _translated() -> Iterator[str]:
    yield "## Translated"
    yield ""
    yield "| option | setting |"
    yield "|---|---|"
    for option, setting in sorted(same_settings().items()):
        if option not in HARMLESS:
            yield f"| `{option}` | `{setting.name}` |"
    for option in sorted(RULES.keys() & ELSEWHERE.keys() - same_settings().keys()):
        yield f"| `{option}` | `{ELSEWHERE[option]}` |"
    yield "| `network_train_unet_only`, `network_train_text_encoder_only` | a learning rate of 0 for the other part |"
    yield "| `network_args` | `conv_dim`, `conv_alpha` and what else is in this table |"
    yield '| `reg_data_dir` | a set with `role = "regularisation"` |'
    yield "| `output_dir`, `output_name` | `output.path` |"
    yield ""


def _defaults() -> Iterator[str]:
    yield "## Where the option is not stated"
    yield ""
    yield "| option | setting | value |"
    yield "|---|---|---|"
    for setting, (option, value) in KOHYA_DEFAULTS.items():
        yield f"| `{option}` | `{setting}` | `{toml_value(value)}` |"
    yield ""


def _left_out() -> Iterator[str]:
    yield "## Left out"
    yield ""
    yield f"Nothing of the LoRA changes with {', '.join(f'`{name}`' for name in sorted(HARMLESS))}. Not needed:"
    yield ""
    for option, reason in sorted(UNNECESSARY.items()):
        if option not in RULES:
            yield f"- `{option}`: {reason}"
    yield ""


def _refused() -> Iterator[str]:
    yield "## Refused"
    yield ""
    yield "All other options, and values that cannot be followed: a resolution that is not square, modules other than"
    yield "`networks.lora`, gradient accumulation, min-SNR together with debiased estimation, and Adafactor that finds its"
    yield "own rate."


if __name__ == "__main__":
    print(kohya_markdown(), end="")
