"""An anchor's tokenizer: which tokens end a reply, and text that stays text.

What a user types is data. A model's control tokens have a spelling, such as `<|im_end|>`, and a tokenizer turns
that spelling into the token wherever it stands. So text is encoded without special tokens here, and a conversation
is encoded around its messages: the chat template's own control tokens count, those inside a message do not.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from mlx_hiermem.errors import AnchorError, ChatTemplateError, HierMemError, first_line
from mlx_hiermem.files import parse_json
from mlx_hiermem.printable import require_unicode
from mlx_hiermem.template_bounds import bounded

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PLACE = "\ue000{}\ue001"  # stands for a message in a rendered template; private characters that nobody types
FRAME = "Question: {}\nAnswer:"  # in which questions are learnt, and asked where there is no chat template
NO_CODE = {"trust_remote_code": False}  # without it transformers asks on the terminal whether to run a model's code


def load_tokenizer(folder: pathlib.Path) -> Any:
    """mlx-lm's tokenizer of a model folder; None where the folder has none (an OpenLM checkpoint brings none).

    Its `eos_token_ids` are all that end a reply, whoever names them: see `end_tokens`.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    import mlx_lm.utils
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of model types that it does not know
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(folder, NO_CODE)
    except Exception as error:  # tokenizers raises plain Exception, and a damaged file anything
        raise AnchorError(f"cannot load the tokenizer of {folder}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    tokenizer.eos_token_ids = set(tokenizer.eos_token_ids) | end_tokens(folder)
    return tokenizer


def end_tokens(folder: pathlib.Path) -> set[int]:
    """The ids that end a reply by config.json and generation_config.json: a chat model often has several."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            config = parse_json((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise AnchorError(f"cannot read {folder / name}: {error}") from error
        for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
            ids = part.get("eos_token_id") if isinstance(part, dict) else None
            found |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    return found


def encode_text(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text in which nothing is markup; `special` puts the tokenizer's own beginning before it."""
    require_unicode(text)
    return list(tokenizer.encode(text, add_special_tokens=special, split_special_tokens=True))


def spells_control(tokenizer: Any, text: str) -> bool:
    """Whether a text holds the spelling of a control token."""
    return any(spelling in text for spelling in _control(tokenizer))


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], reply: bool = True, **options: Any
) -> list[int]:
    """Token ids of a conversation in the chat template; with `reply`, ready for the assistant's words.

    Where no message spells a control token, this is what the template and the tokenizer make of it. Raises
    ChatTemplateError for whatever the template raises: it is a program of the model's.
    """
    for message in messages:
        require_unicode(_content(message))
    try:
        with bounded():
            return _encode_chat(tokenizer, messages, options | {"add_generation_prompt": reply})
    except HierMemError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"the anchor's chat template refuses the messages: {reason}") from error


def framed(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation in the frame that questions are learnt in, up to the answer that is to come.

    Raises ChatTemplateError for roles that the frame has no place for.
    """
    text = ""
    for message in messages:
        said = (message.get("content") or "").strip()
        match message["role"]:
            case "system":
                text += f"{said}\n\n"
            case "user":
                text += FRAME.format(said)
            case "assistant":
                text += f" {said}\n\n"
            case role:
                raise ChatTemplateError(f"this anchor has no chat template, and so no messages of the role {role}")
    return text


def _encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    if not any(spells_control(tokenizer, _content(message)) for message in messages):
        return list(tokenizer.apply_chat_template(list(messages), tokenize=True, **options))
    ids = _control(tokenizer)
    control = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))
    tokens: list[int] = []
    piece = ""  # the template's text and the messages' since the last control token
    for text, is_message in _parts(tokenizer, messages, options):
        end = 0
        for found in () if is_message else control.finditer(text):
            tokens += encode_text(tokenizer, piece + text[end : found.start()], special=False)
            tokens.append(ids[found.group()])
            piece, end = "", found.end()
        piece += text[end:]
    return tokens + encode_text(tokenizer, piece, special=False)


def _control(tokenizer: Any) -> dict[str, int]:
    """Spelling -> id of the control tokens."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): index for index, token in known.items() if token.special}


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _parts(tokenizer: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[tuple[str, bool]]:
    """The rendered conversation in parts: (text, whether it is a message's)."""
    marked = [  # a turn that only calls tools stays without content
        message | {"content": PLACE.format(number)} if _content(message) else message
        for number, message in enumerate(messages)
    ]
    rendered = tokenizer.apply_chat_template(marked, tokenize=False, **options)
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    pieces = re.split(PLACE.format(r"(\d+)"), rendered)  # text, number, text, number, ..., text
    found: list[tuple[str, bool]] = []
    trimmed = not all(_content(message) in whole for message in messages)  # many templates strip what was said
    for number, piece in enumerate(pieces):
        text = _content(messages[int(piece)]) if number % 2 else piece
        found.append((text.strip() if trimmed and number % 2 else text, bool(number % 2)))
    return found
