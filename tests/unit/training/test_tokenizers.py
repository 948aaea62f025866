from __future__ import annotations

from qz3_widgets.training.tokenizers import byte_tokenizer


def test_any_text_comes_back() -> None:
    tokenizer = byte_tokenizer()
    for text in ("plain", "Ünïcödé ✓ 漢字", "a\n\tb  c", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_small_and_knows_chats() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    done = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    counted = [token for token, mask in zip(done["input_ids"], done["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(counted) == "yo<|im_end|>"
