from __future__ import annotations

import pytest

from qz3_widgets.runs.secrets import redact, redact_argv, redact_tree

PLANTED = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "ghp_0123456789abcdefghij0123456789abcdef",
    "sk-proj-0123456789abcdefghij",
    "AKIAIOSFODNN7EXAMPLE",
]


@pytest.mark.parametrize("secret", PLANTED)
def test_tokens_known_by_their_look(secret: str) -> None:
    hidden = redact(f"got {secret}, then failed")
    assert secret not in hidden
    assert secret[4:12] not in hidden
    assert "***" in hidden
    assert hidden.endswith(", then failed")


@pytest.mark.parametrize(
    "text, secret",
    [
        ("HF_TOKEN=plainword123 python x.py", "plainword123"),
        ("export WANDB_API_KEY='two words'", "two words"),
        ('{"OPENAI_API_KEY": "plainword123", "x": 1}', "plainword123"),
        ("MY_SECRET: plainword123", "plainword123"),
        ("DB_PASSWORD=plainword123;next", "plainword123"),
        ("api_key=plainword123", "plainword123"),
        ("password: plainword123", "plainword123"),
        ("https://me:plainword123@host.example/x?y=1", "plainword123"),
        ("https://plainword123@host.example/x", "plainword123"),
        ("redis://:plainword123@host:6379/0", "plainword123"),
        ("Authorization: Bearer plainword123", "plainword123"),
        ("authorization: Basic cGxhaW4=", "cGxhaW4="),
        ("{'Authorization': 'Bearer plainword123'}", "plainword123"),
        ("curl -H 'Proxy-Authorization: token plainword123'", "plainword123"),
    ],
)
def test_secrets_by_their_place(text: str, secret: str) -> None:
    hidden = redact(text)
    assert secret not in hidden
    assert "***" in hidden


@pytest.mark.parametrize(
    "text",
    [
        "HF_TOKEN", "TOKENIZERS_PARALLELISM=false", "max_tokens=128", "pad_token: <|endoftext|>", "num_tokens: 42",
        "KeyError: 'lm_head'", "meta-llama/Llama-3.1-8B", "https://host.example/path?x=1", "user@host.example",
        "key: value", "step 40 loss 1.2872", "hf_transfer", "hf_hub_download", "C:/a:b@c", "tokens: 5", "s3://bucket/key",
        "/home/me/keys/run-1", "ValueError: monkey=3",
    ],
)  # fmt: skip
def test_harmless_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_redacting_twice_changes_nothing() -> None:
    text = "HF_TOKEN=abc https://a:b@c/ Authorization: Bearer abcdefgh hf_AbCdEfGhIjKlMnOp"
    assert redact(redact(text)) == redact(text)


def test_argv() -> None:
    argv = ["qz3", "run", "--token", "plainword123", "--hf-token=plainword123", "--set", "lora.r=8", "-x", PLANTED[0]]
    hidden = redact_argv(argv)
    assert "plainword123" not in " ".join(hidden)
    assert hidden == ["qz3", "run", "--token", "***", "--hf-token=***", "--set", "lora.r=8", "-x", "hf_***"]


def test_nested_values() -> None:
    tree = {"HF_TOKEN": "plainword123", "a": [{"password": "plainword123"}, f"x {PLANTED[0]}"], "n": 3, "token": None}
    hidden = redact_tree(tree)
    assert hidden == {"HF_TOKEN": "***", "a": [{"password": "***"}, "x hf_***"], "n": 3, "token": None}
