"""A corpus of what must not be published, none of which is left, and of what must stay as it is."""

from __future__ import annotations

import json

import pytest

from sdlora.formats.redaction import changed_keys, redacted

# What is planted contains "secret" or "jane", which nothing that is left may contain.
TEXTS = [
    "/home/jane/base.safetensors", "/Users/jane/models/x.ckpt", "/mnt/secret/x.pt", "/root/secret/vae.pt",
    "~/secret/x.safetensors", "~jane/x.safetensors", "~/.cache/secret/hub/x", "see ~/secret/a.txt for more",
    "trained from /home/jane/sets/cats/1.png today", "--in=/home/jane/sets/a.png --rank 4",
    "'/home/jane/my secret set/1.png' and more", 'open "C:\\Users\\jane doe\\my set\\x.png" first',
    "file:///home/jane/x.safetensors", "file:/home/jane/x.ckpt", "file://C:/Users/jane/x.pt",
    "loaded file:///srv/secret/x.safetensors just now", "FILE:///Users/jane/x",
    r"C:\Users\jane\x.ckpt", "C:/Users/jane/x.ckpt", r"d:\secret\sets\x.png", r"at D:\secret\x.png there",
    r"%USERPROFILE%\secret\x.txt", r"read %APPDATA%\secret\x.txt", "$HOME/secret/x.txt", "in ${HOME}/secret/x.txt",
    r"\\secretserver\share\x.ckpt", r"from \\nas\secret\sets\x.png now", r"\\10.0.0.5\jane\x", "//nas/secret/x.safetensors",
    "jane@example.org", "Jane Doe <jane@example.org>", "by jane.doe+sd@mail.example.co.uk, 2024",
    "made by Jane <jane@example.org> in May", '"Doe, Jane" <jane@example.org>', "mail: jane_d@example.com",
    "hf_secretSECRETsecret123", "token hf_secretSECRETsecret123 used", "sk-secretsecret1234567890",
    "sk-proj-secret_12345-secret",
    "api_key=secret12345", "api-key: secret12345", "API_KEY='secret 12345'", "apikey=secret12345",
    "?token=secret12345&x=1",
    "access_token=secret12345", "WANDB_API_KEY=secret12345", "password=secret12345",
    "Authorization: Bearer secret.12345.abcdef",
    "ghp_secretsecret12345", "github_pat_secretsecret12345", "glpat-secretsecret12345", "xoxb-secret-secret12345",
    "https://jane:secret@example.org/repo", "https://jane@example.org/x", "https://hf_secretSECRET@huggingface.co/x",
    "secretbox.local", "run on jane-pc.lan at night", "http://secret.internal:6006/runs", "secret.corp",
    "hostname=secretbox",
    "host: janes-imac.home", "node_name=secret-7", "user=jane", "jane@secretbox:~/sets", "rsync jane@box:/srv/secret/x .",
    "http://jane.localdomain/x",
]  # fmt: skip
KEYED = [
    ("ss_dataset_dirs", {"10_secret cats": {"n_repeats": 10, "img_count": 5}}),
    ("ss_tag_frequency", {"3_jane": {"cat": 3}, "/home/jane/secret": {"dog": 1}}),
    ("ss_reg_dataset_dirs", {"1_secret": {"n_repeats": 1}}),
    ("ss_datasets", [{"subsets": [{"image_dir": "/home/jane/10_x", "caption": "D:\\secret\\x.txt"}]}]),
    ("ss_network_args", {"token": "secret", "api_key": "secret", "hostname": "secret"}),
    ("ss_lists", ["/mnt/secret/a.png", ["jane@example.org"]]),
    ("hostname", "secretbox"), ("ss_user_name", "jane"), ("hf_token", "secret"), ("ss_password", "secret"),
]  # fmt: skip
INNOCENT = [
    "", "None", "0", "1e-4", "1.5", "True", "sd_v1", "fp16", "10/12", "a/b testing, 1/2, and/or", "cat, dog, 1girl",
    "stable-diffusion-v1/lora", "https://github.com/kohya-ss/sd-scripts/tree/main", "https://civitai.com/models/1?v=2#a",
    "runwayml/stable-diffusion-v1-5", "https://huggingface.co/stabilityai/sdxl-vae", "0x" + "ab" * 32, "ab" * 20,
    "data:image/jpeg;base64,/9j/4AAQSk/ZJRg/abc", "2024-05-06T07:08:09", "12:30", "conv_dim=4", "dropout=0.1, scale: 2",
    "token", "the trigger token", "Put the word zorb into the prompt.", "a secretary, at a desk", "a password manager",
    "base.safetensors", "my style.safetensors", "1.2.3", "0.42.1", "v2.0", "(cat:1.2), [dog], {a|b}", "~ 30 steps", "~30",
    "loha", "text_encoder, unet", "blue lines @ night", "@artist", "5 @ 1024", "key visual", 
    "a home, a local bar",
    "$5 a month", "50% off", "C: major", "networks.lora", "torch.optim.adamw.AdamW",
    "bitsandbytes.optim.adamw.AdamW8bit",
    "user friendly", "host of a party", "basic shapes", "bearer of bad news", "skirt, sk-8", "CC BY 4.0", "Ada & Ben",
    "{broken",
    "[not json", '{"a": 1,  "b": [1.50, "x"]}', '{"dog": {"cat, tree": 3}}', "éüß 日本語 / 한국어",
    "\\", "a\\b", "line\nline",
    "secrets: none", "sampler: euler_a", "10.5 GB", "1024x1024", "shadow of a host", "user: ",
]  # fmt: skip


def test_the_corpus_is_large() -> None:
    assert len(set(TEXTS)) + len(KEYED) >= 60
    assert len(set(INNOCENT)) >= 40


def kept(values: dict[str, str]) -> str:
    return " ".join(values.values()).lower()


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_planted_is_left(text: str) -> None:
    tree = json.dumps({"inner": [text], text: 1})
    clean = redacted({"ss_x": text, "ss_tree": tree})
    assert "jane" not in kept(clean), clean
    assert "secret" not in kept(clean), clean
    assert "nas" not in kept(clean)
    assert changed_keys({"ss_x": text, "ss_tree": tree}, clean) == ("ss_tree", "ss_x")
    assert redacted(clean) == clean


@pytest.mark.parametrize(("key", "value"), KEYED)
def test_nothing_planted_is_left_under_its_key(key: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    clean = redacted({key: text})
    assert "jane" not in kept(clean), clean
    assert "secret" not in kept(clean), clean
    assert redacted(clean) == clean


@pytest.mark.parametrize("text", INNOCENT)
def test_the_rest_stays(text: str) -> None:
    assert redacted({"ss_x": text}) == {"ss_x": text}


def test_folders_of_images_have_the_same_new_names_everywhere() -> None:
    stated = {
        "ss_dataset_dirs": json.dumps({"10_zoe": {"n_repeats": 10}, "2_ada": {"n_repeats": 2}}),
        "ss_tag_frequency": json.dumps({"10_zoe": {"cat": 3}, "2_ada": {"a/b": 1}}),
    }
    clean = {key: json.loads(value) for key, value in redacted(stated).items()}
    assert clean["ss_dataset_dirs"] == {"folder-1": {"n_repeats": 10}, "folder-2": {"n_repeats": 2}}
    assert clean["ss_tag_frequency"] == {"folder-1": {"cat": 3}, "folder-2": {"a/b": 1}}
