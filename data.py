"""From a text to a batch you can look at: tokenizer, conversation format, tasks, the procedural source, readers.

    batch field         shape    dtype    who reads it
    context_ids         (B, N)   int64    the reading pass                       } absent in the base stage, where the
    context_mask        (B, N)   bool     1 = real token                         } text stands in the prompt
    input_ids           (B, S)   int64    the answering pass: the conversation
    attention_mask      (B, S)   int64    0 = padding, else the number of the conversation in its row: they do not see each other
    weights             (B, S)   float32  weight of the loss of predicting input_ids[:, t]; 0 = not counted
    counted             (K,)     int64    the loss: where the flattened weights[:, 1:] are not 0 (and some where they are, see collate)

A mask of ones only may be absent: train.gradients leaves it out.

One conversation (tokens between bars, the ones that carry loss in capitals); ids and weights come from one call:

    <|im_start|>|us|er|\n| where| is| the| parrot|?|<|im_end|>|\n|<|im_start|>|ass|ist|ant|\n| THE| LIGHTHOUSE|<|IM_END|>|\n

`python data.py` prints examples of every task in colour; `python data.py --write FILE --count 1000` writes a held-out
evaluation set as JSON lines.
"""
import argparse
import base64
import heapq
import json
import lzma
import math
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import tiktoken
import torch

from model import UserError, read_file, read_json, write_file, write_json

ASSETS = Path(__file__).parent / "assets"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<RECON>", "<COMP>"]
TASKS = [*SPECIAL[3:], "<NOTHING>"]      # the method's own, which no text may spell
# words with their space, digits one by one, runs of signs, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN_SPECIAL = SPECIAL[:3]
BLANK = 500_000      # characters of white space in a row, from twice of which on tiktoken's regular expression runs out of stack
UNKNOWN, NO_TEXT = "The text does not say.", "I do not know."
POINT = "\u2024"      # stands for a full stop that ends no sentence while a text is cut into sentences
ABBREVIATION = re.compile(r"(?<=\d)\.(?=\d)|\b(?:Mr|Mrs|Ms|Dr|Prof|Rev|Capt|St|vs|[A-HJ-Z])\.(?= )|\bNo\.(?= \d)|\b[ap]\.m\.(?= [a-z]| [A-Z][a-z]*\. )|\b[ei]\.[ge]\.")


# ---------------------------------------------------------------------------- tokenizer
def train_bpe(texts, vocab_size):
    """Byte-level BPE: texts (iterable of str) -> {bytes: rank} of vocab_size - len(SPECIAL) entries.

    >>> sorted(train_bpe(["aaa aaa"], 256 + 2 + len(SPECIAL)), key=len)[-1]
    b'aaa'
    """
    import regex   # tiktoken's own dependency; used for training only
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    weight = list(counts.values())
    pairs, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weight[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    heap = [(-count, pair) for pair, count in pairs.items()]       # entries go stale when a count changes: checked on the way out
    heapq.heapify(heap)
    while len(ranks) < vocab_size - len(SPECIAL) and heap:
        count, best = heapq.heappop(heap)
        if pairs.get(best) != -count:
            if pairs.get(best):
                heapq.heappush(heap, (-pairs[best], best))
            continue
        joined = b"".join(best)
        ranks.setdefault(joined, len(ranks))
        for i in where.pop(best):
            word, new = words[i], []
            for pair in zip(word, word[1:]):
                pairs[pair] -= weight[i]
                if pairs[pair] <= 0:
                    del pairs[pair]
            while word:
                n = 2 if tuple(word[:2]) == best else 1
                new.append(b"".join(word[:n]))
                word = word[n:]
            words[i] = new
            for pair in zip(new, new[1:]):
                pairs[pair] += weight[i]
                where[pair].add(i)
                if joined in pair:
                    heapq.heappush(heap, (-pairs[pair], pair))
        pairs.pop(best, None)
    return ranks


class Tokenizer:
    """Text <-> ids on top of a tiktoken Encoding.

    special: names, which take the ids after the last rank, or {name: id}. With prefix_space (our own vocabularies) every
    piece of content is encoded behind a space, so that " green" is one and the same token in the text, in the question and as
    an answer. normalize: a Unicode form such as NFC, or None. think: what stands before an answer, as text; stops: ids.
    """

    def __init__(self, ranks, pattern=PATTERN, special=SPECIAL, prefix_space=True, normalize=None, think="", stops=None):
        first = max(ranks.values()) + 1
        self.special = dict(special) if isinstance(special, dict) else {name: first + i for i, name in enumerate(special)}
        self.encoding = tiktoken.Encoding("shine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.ranks, self.pattern, self.prefix_space, self.normalize = ranks, pattern, prefix_space, normalize
        self.vocab_size = max(first, *(i + 1 for i in self.special.values()))
        self.end, self.im_start, self.im_end, self.recon, self.comp = (self.special[name] for name in SPECIAL)
        self.stops = sorted(stops or (self.im_end, self.end))
        self.splits = re.compile("(" + "|".join(map(re.escape, sorted(set(self.special) - set(TASKS), key=len, reverse=True))) + ")")
        self.newline = self.encoding.encode_ordinary("\n")
        self.close = [self.im_end, *self.newline]
        self.think = self.encode(think, special=True)
        self.roles = {role: [self.im_start, *self.encoding.encode_ordinary(role), *self.newline]
                      for role in ("system", "user", "assistant")}

    def encode(self, text, special=False):
        """str -> ids. Special tokens written in the text stay ordinary text; with special=True they become their ids, as in
        the Hugging Face tokenizer."""
        if special:
            parts = self.splits.split(text)                  # text, special, text, ...: each text is normalized by itself
            return [i for k, part in enumerate(parts) for i in ([self.special[part]] if k % 2 else self.encode(part))]
        if not text:
            return []
        text = text.encode("utf-8", "replace").decode()      # a lone surrogate cannot be encoded
        if len(text) > BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > BLANK:
            raise UserError(f"more than {BLANK:,} characters of white space in a row: take some out")
        if self.normalize:
            text = unicodedata.normalize(self.normalize, text)
        return self.encoding.encode_ordinary(" " + text if self.prefix_space else text)

    def decode(self, ids):
        """ids -> str, the inverse of encode. An id that stands for nothing (rows that pad an embedding) gives nothing."""
        text = b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")
        return text[1:] if self.prefix_space and text[:1] == " " else text

    def token_bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return b""

    def piece(self, i):
        """One token as it can be printed."""
        return self.token_bytes(i).decode("utf-8", "replace").replace("\n", "\\n")

    def save(self, folder):
        ranks = [base64.b64encode(token).decode() for token, _ in sorted(self.ranks.items(), key=lambda kv: kv[1])]
        write_json(Path(folder) / "bpe.json", {"pattern": self.pattern, "special": list(self.special),
                                               "prefix_space": self.prefix_space, "ranks": ranks})

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "bpe.json"
        raw = read_json(path)
        try:
            ranks = {base64.b64decode(token): i for i, token in enumerate(raw["ranks"])}
            if missing := {bytes([b]) for b in range(256)} - set(ranks):
                raise ValueError(f"{len(missing)} of the 256 bytes are missing")
            return cls(ranks, raw["pattern"], raw["special"], raw["prefix_space"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not one of our tokenizers ({error!r})") from None

    def save_hugging_face(self, folder):
        """tokenizer.json and tokenizer_config.json, as transformers reads them; the chat template puts our space where it belongs."""
        letter = {b: c for c, b in unicode_to_byte().items()}
        spell = lambda token: "".join(letter[b] for b in token)
        merges = [[spell(part) for part in halves(self.ranks, token)] for token, _ in sorted(self.ranks.items(), key=lambda kv: kv[1])
                  if len(token) > 1]
        added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                 for name, i in sorted(self.special.items(), key=lambda kv: kv[1])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        write_json(Path(folder) / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": self.normalize} if self.normalize else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level | {"use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {spell(token): i for token, i in self.ranks.items()}, "merges": merges}})
        space, think = " " * self.prefix_space, "".join(map(self.piece, self.think))
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False, "chat_template":
                "{% for message in messages %}<|im_start|>{{ message.role }}\n" + space + "{{ message.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n" + think + "{% endif %}"})

    @classmethod
    def from_hugging_face(cls, folder):
        """The tokenizer of a Hugging Face Qwen folder: tokenizer.json, or vocab.json + merges.txt + tokenizer_config.json.

        `<RECON>`, `<COMP>` and `<NOTHING>` take the three ids after its last, as in the published code. UserError names the
        file and what in it is of a kind that this byte-level BPE is not.
        """
        folder = Path(folder)
        config, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
        settings = read_json(config) if config.is_file() else {}
        pattern, normalize = QWEN_PATTERN, "NFC"
        try:
            if path.is_file():
                raw = read_json(path)
                pattern, normalize = splitting(path, raw)
                vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
                added = [(token["content"], token["id"]) for token in raw.get("added_tokens", ())]
            else:
                path = folder / "vocab.json"
                vocab = read_json(path)
                lines = read_file(folder / "merges.txt").split("\n")
                merges = [line for line in lines[lines[0].startswith("#version"):] if line]
                added = [(token["content"], int(i)) for i, token in settings.get("added_tokens_decoder", {}).items()]
            special = {name: i for name, i in added if name not in TASKS} or {n: len(vocab) + i for i, n in enumerate(QWEN_SPECIAL)}
            byte = unicode_to_byte()
            spell = lambda token: bytes(byte[c] for c in token)
            ranks = {spell(token): i for token, i in vocab.items() if token not in special}
            made = [ranks[spell(a) + spell(b)] for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]
            ids = [*ranks.values(), *special.values()]
            named = all(isinstance(name, str) and name for name in special)
            if not named or len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids):
                raise ValueError("ids are not whole numbers, each used once, or a token is empty")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a byte-level BPE as Qwen's ({error!r})") from None
        if any(a >= b for a, b in zip(made, made[1:])) or len(made) + 256 != len(ranks) or any(bytes([b]) not in ranks for b in range(256)):
            raise UserError(f"{path}: the merges are not in the order of their ids, so this is not a vocabulary as Qwen's")
        missing = [name for name in QWEN_SPECIAL if name not in special]
        if missing:
            raise UserError(f"{path} has no token {missing[0]}: the chat format needs it")
        last = max(ids)
        special |= {name: last + 1 + i for i, name in enumerate(TASKS)}
        think = think_block(folder, settings) if "<think>" in special else ""
        try:
            return cls(ranks, pattern, special, False, normalize, think, stop_ids(folder, last))
        except ValueError as error:
            raise UserError(f"{folder}/tokenizer.json: the pattern that cuts words cannot be used ({error})") from None


def think_block(folder, settings):
    """What the model expects before its answer with thinking off: an empty block where its chat template knows the switch."""
    template = settings.get("chat_template") or ""
    template = template if isinstance(template, str) else json.dumps(template)          # some folders have several
    if (folder / "chat_template.jinja").is_file():
        template = read_file(folder / "chat_template.jinja")
    return "<think>\n\n</think>\n\n" if not template or "enable_thinking" in template else ""


def stop_ids(folder, last):
    """The ids that end an answer by generation_config.json, or None; each is at most `last`."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    stops = eos if isinstance(eos, list) and eos else [eos]
    if eos is not None and not all(type(i) is int and 0 <= i <= last for i in stops):
        raise UserError(f"{path}: eos_token_id = {eos!r} is not a token id or a list of them")
    return None if eos is None else stops


def halves(ranks, token):
    """The two tokens that a byte-level BPE joins last to make this one.

    >>> halves({b"a": 0, b"b": 1, b"ab": 2, b"abb": 3}, b"abb")
    [b'ab', b'b']
    """
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], float("inf")))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


class Ids:
    """Stands in for a tokenizer: a text is token ids in decimal, and a conversation is its ids in a row, without a chat format.

    >>> Ids().encode("5 17")
    [5, 17]
    """
    end, roles, close, think, stops, prefix_space = 0, {"system": [], "user": [], "assistant": []}, [], [], [], True

    def __init__(self, vocab_size=2 ** 31):
        self.vocab_size = vocab_size

    def encode(self, text):
        if not re.fullmatch(r"\s*\d+(\s+\d+)*\s*", text or "", re.ASCII):
            raise UserError(f"--ids: {text[:40]!r} is not a row of token ids such as '5 17 3'")
        ids = [int(word) for word in text.split()]
        if max(ids) >= self.vocab_size:
            raise UserError(f"--ids: {max(ids)} is not among the {self.vocab_size} tokens of this model")
        return ids

    def decode(self, ids):
        return " ".join(map(str, ids))

    piece = staticmethod(str)


def splitting(path, raw):
    """tokenizer.json -> (the pattern that cuts words, Unicode form or None); anything but Qwen's kind is refused."""
    def need(value, wanted, where):
        if value not in wanted:
            raise UserError(f"{path}: {where} = {value!r} is not supported, only {' or '.join(map(repr, wanted))}")
    need(raw["model"].get("type", "BPE"), ("BPE",), "model.type")
    for key, plain in (("dropout", (None,)), ("byte_fallback", (None, False)), ("ignore_merges", (None, False)),
                       ("continuing_subword_prefix", (None, "")), ("end_of_word_suffix", (None, ""))):
        need(raw["model"].get(key), plain, f"model.{key}")
    normalizer = raw.get("normalizer") or {}
    need(normalizer.get("type"), (None, "NFC", "NFKC", "NFD", "NFKD"), "normalizer.type")
    steps = raw.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    need([step.get("type") for step in steps], (["Split", "ByteLevel"],), "pre_tokenizer")
    need(steps[0].get("behavior"), ("Isolated",), "pre_tokenizer.behavior")
    need(steps[0].get("invert", False), (False,), "pre_tokenizer.invert")
    need((steps[1].get("add_prefix_space"), steps[1].get("use_regex")), ((False, False),), "ByteLevel (add_prefix_space, use_regex)")
    pattern = steps[0]["pattern"]["Regex"]
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"the pattern is {pattern!r}")
    return pattern, normalizer.get("type")


@lru_cache(maxsize=None)
def unicode_to_byte():
    """The table of byte-level BPE files: printable characters stand for themselves, the other bytes for U+0100 and up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


# ---------------------------------------------------------------------------- conversations
def render(tokenizer, turns, context=None, context_weight=0.0, open_ended=False):
    """A conversation -> (ids, weights), lists of one length. ChatML, the text in a system turn where there is one.

    turns: [(role, content)], content a str or a list of ids. Loss is on the assistant's content and its <|im_end|>;
    `context_weight` is the weight of the text's own tokens. open_ended ends with an open assistant turn, for generation
    (an empty think block in it where the model's template has one; training has none, as in the published code).
    """
    ids, weights = [], []

    def add(part, weight):
        ids.extend(part)
        weights.extend([weight] * len(part))

    if context is not None:
        turns = [("system", context), *turns]
    for role, content in turns:
        weight = {"assistant": 1.0, "system": context_weight}.get(role, 0.0)
        if role == "user" and isinstance(content, str) and not tokenizer.prefix_space:       # in one piece, as the template is
            add([tokenizer.im_start, *tokenizer.encode(f"user\n{content}")], 0.0)
        else:
            add(tokenizer.roles[role], 0.0)
            add(tokenizer.encode(content) if isinstance(content, str) else content, weight)
        add(tokenizer.close[:1], 1.0 if role == "assistant" else 0.0)
        add(tokenizer.close[1:], 0.0)
    if open_ended:
        add(tokenizer.roles["assistant"] + tokenizer.think, 0.0)
    return ids, weights


def reconstruction(tokenizer, texts, rng):
    """Paper, section 6: several texts in one context, one `<RECON>` turn for each. -> (context ids, turns)"""
    order = rng.sample(texts, len(texts))
    context = join([tokenizer.encode(t) for t in texts], tokenizer.end)
    return context, [turn for t in order for turn in (("user", [tokenizer.recon]), ("assistant", t))]


def completion(tokenizer, texts, rng):
    """The same with each text's last 10-30 % cut away between words; the `<COMP>` turn answers the whole text."""
    cut = []
    for text in texts:
        words = text.split(" ")
        keep = max(1, len(words) - max(1, round(len(words) * rng.uniform(0.1, 0.3))))
        cut.append(" ".join(words[:keep]))
    order = rng.sample(texts, len(texts))
    context = join([tokenizer.encode(t) for t in cut], tokenizer.end)
    return context, [turn for t in order for turn in (("user", [tokenizer.comp]), ("assistant", t))]


def join(parts, separator):
    out = list(parts[0])
    for part in parts[1:]:
        out += [separator, *part]
    return out


# ---------------------------------------------------------------------------- the procedural source
def held_out(line):
    """One line in eight, chosen by its own text, is never used in training: evaluation texts are made of those."""
    return zlib.crc32(line.encode()) % 8 == 0


def open_class(lines):
    """Whether a word list is one of many (names, things) and so has a held-out part; short lists (days) and verbs serve both splits."""
    return len(lines) >= 60 and "|" not in lines[0]


def read_lines(path):
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]


SLOT = re.compile(r"\{(\w)('s|\.\w+|\^)?\}")
OWNED = re.compile(r"(\w+(?: old)? \w+) (\{\w's\} [^{}]+?)( called)?\?")       # "What is {A's} sister called?": may be asked "And her sister?"
CAST = {"person": 4, "pet": 2, "town": 2}      # how many of them a text has at most: see Source.make_cast
CLAUSE = re.compile(r"(^|[.,;:!?]|\b(and|but|that|which|when|where|while|because|since|before|after|as|if|though|although|so|or|until|is|was|does|did|has|can|will))\s*$", re.I)


class Frame:
    """One fact, or a scene: a whole little text. Its slots, statements, questions; see assets/README.md."""

    def __init__(self, head, where, scene=False):
        match = re.fullmatch(r"\[([\w.-]+)\]((?: +\w=\w+)*)\s*", head)
        if not match:
            raise UserError(f"{where}: a frame's head reads [topic.name] slot=type ..., not {head!r}")
        self.name, self.topic = match[1], match[1].split(".")[0]
        self.slots = dict(pair.split("=") for pair in match[2].split())
        self.cast = [s for s, t in self.slots.items() if t in CAST]
        self.values = [s for s, t in self.slots.items() if t not in CAST]
        if many := [t for t, count in Counter(self.slots[s] for s in self.cast).items() if count > CAST[t]]:
            raise UserError(f"{where}: [{self.name}] has more than {CAST[many[0]]} slots of type {many[0]}, which is all that a text has")
        self.facts = max(1, sum(not t.startswith("act_") for t in self.slots.values()) - 1)      # values tied to a subject, no verbs
        self.scene = scene
        self.statements, self.questions, self.checks = [], [], []     # [line], [(line, answer, [(follow-up, answer)])], [line]
        self.unsaid = []                                              # [line]: questions that no statement answers

    def add(self, line, where):
        kind, _, body = line.partition(" ")
        if kind == ":" and (match := re.fullmatch(r"(\w) = (.+)", body)):
            self.slots[match[1]] = tuple(value.strip() for value in match[2].split(" | "))
            self.values.append(match[1])
            return
        for slot, form in SLOT.findall(body):
            if slot not in self.slots:
                raise UserError(f"{where}: slot {slot} is not in the head of [{self.name}]")
            if form not in ("", "^", ".ed") and self.slots[slot] not in CAST:
                raise UserError(f"{where}: {{{slot}{form}}}: only a person, a pet or a town has this form")
        if kind == "." and body:
            self.statements.append(body)
        elif kind == "?" and " = " in body:
            self.questions.append((*body.rsplit(" = ", 1), []))
        elif kind == ">" and " = " in body and self.questions:
            self.questions[-1][2].append(tuple(body.rsplit(" = ", 1)))
        elif kind == "!" and body:
            self.checks.append(body)
        elif kind == "-" and body:
            self.unsaid.append(body)
        else:
            raise UserError(f"{where}: a line starts with '. statement', '? question = answer', '> follow-up = answer', '! question', "
                            f"'- question' or ': slot = value | value', not {line!r}")


def unknown_list(value, words):
    """The name of a {list} inside a value that is neither one of the word lists nor a range of numbers, or None."""
    names = (name[0].lower() + name[1:] for name in re.findall(r"\{([\w-]+)\}", value))
    return next((name for name in names if name not in words and not re.fullmatch(r"\d+-\d+", name)), None)


@lru_cache(maxsize=None)
def load_assets(folder):
    """-> ({type: [value]}, [Frame] of facts and scenes); a bad line is named."""
    words = {p.stem: read_lines(p) for p in sorted((folder / "words").glob("*.txt"))}
    frames = []
    for path in sorted((folder / "frames").glob("*.txt")) + sorted((folder / "scenes").glob("*.txt")):
        file, scene = path.name, path.parent.name == "scenes"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where, line = f"{file}:{number}", line.strip()
            if line.startswith("["):
                frames.append(Frame(line, where, scene))
                unknown = {t for t in frames[-1].slots.values() if t not in CAST and t not in words}
                if unknown:
                    raise UserError(f"{where}: there is no word list {min(unknown)}.txt")
            elif line and not line.startswith("#"):
                if not frames:
                    raise UserError(f"{where}: a line before the first [head]")
                frames[-1].add(line, where)
                if line.startswith(": ") and (name := unknown_list(line, words)):
                    raise UserError(f"{where}: there is no word list {name}.txt; a value holds {{list}} or {{1-9}}, no slot")
    article = re.compile("^(an?|the) ")
    bare = lambda value: article.sub("", value.lower())
    unseen = {bare(line) for lines in words.values() if open_class(lines) for line in lines if held_out(line)}
    for frame in frames:      # a scene's own lists are for training: without what is held out
        own = {slot: tuple(v for v in values if bare(v) not in unseen) for slot, values in frame.slots.items() if isinstance(values, tuple)}
        frame.slots |= {slot: values for slot, values in own.items() if values}
    return words, frames


def outline(value):
    """What values that can stand in each other's places have in common: how they begin, how the last word ends, about how many words.

    >>> outline("behind the old barn") == outline("behind the red fence"), outline("an oak") == outline("the oaks")
    (True, False)
    """
    ending = lambda word: next((end for end in ("ing", "ed", "er", "ly", "s") if word.endswith(end)), "")      # noqa: E731
    words, little = value.split(), Miner.COMMON | Miner.PREPOSITIONS
    small = len(words) > 1 and words[0] in little
    head = [word for word in words[:2] if word in little] if small else [value[0].isupper(), value[0].isalpha(), ending(words[0])]
    return *head, ending(words[-1]), min(len(words), 4)


class Character:
    """A person, pet or town that all frames of a text share, and its forms."""

    def __init__(self, kind, name, gender):
        self.kind, self.name, self.gender = kind, name, gender       # gender: f, m, it, I
        subject, object_, possessive, reflexive = {
            "f": ("she", "her", "her", "herself"), "m": ("he", "him", "his", "himself"),
            "it": ("it", "it", "its", "itself"), "I": ("I", "me", "my", "myself")}[gender]
        I = gender == "I"
        self.pronoun = {"": subject, "'s": possessive, ".o": object_}
        self.forms = {"": "I" if I else name, "'s": "my" if I else name + "'s", ".o": "me" if I else name, "^": "I" if I else name,
                      ".he": subject, ".him": object_, ".his": possessive, ".himself": reflexive,
                      ".it": subject, ".its": possessive, ".itself": reflexive, "answer": "you" if I else name}


class Fact:
    """A frame with its slots filled, and the statement that was chosen for it."""

    def __init__(self, frame, values, statement):
        self.frame, self.values, self.statement = frame, values, statement
        self.said = {m[1] for m in SLOT.finditer(statement)}

    def says(self, line):
        """Whether all slots of a line stand in the statement."""
        return {m[1] for m in SLOT.finditer(line)} <= self.said

    @property
    def hero(self):
        """Whom it is about; a scene is about many things."""
        return self.values[self.frame.cast[0]] if self.frame.cast and not self.frame.scene else None


class Source:
    """Endless texts with conversations, made from the word lists and frames.

    split "train" uses what held_out() leaves; "heldout" draws names and values from the lines never used in training (lists
    of fewer than 60 lines, such as colors and days, serve both) and phrasings from all lines, one in eight of them unseen. `sample(rng)` -> {"context", "conversations", "meta"}.
    """

    def __init__(self, split="train", max_facts=8, folder=ASSETS):
        assert split in ("train", "heldout"), split
        words, frames = load_assets(folder)
        self.scenes, self.scene_share = [f for f in frames if f.scene], 0.0      # share of texts that are a scene, not single facts
        self.company_share = 0.0                  # share of the scenes that stand among single facts about others
        self.exchange_share, self.alike = 0.0, {}           # see let_exchange
        self.frames = [f for f in frames if not f.scene for _ in range(3 if f.topic.startswith("act") else 1)]       # the general ones more often
        self.split, self.max_facts, self.wild, self.wild_share = split, max_facts, [], 0.0      # see let_wild
        self.words = {}
        for kind, lines in words.items():
            part = [w for w in lines if held_out(w) == (split == "heldout")] if open_class(lines) else lines
            self.words[kind] = part or lines
        self.by_cast = {"person": [f for f in self.frames if f.cast and f.slots[f.cast[0]] == "person"],
                        "other": [f for f in self.frames if not f.cast or f.slots[f.cast[0]] != "person"], "all": self.frames}

    def scenes_named(self, beginnings):
        """The scenes whose names begin so: "fh_,hm_"."""
        beginnings = tuple(filter(None, beginnings.split(","))) or ("",)
        if unknown := [b for b in beginnings if not any(f.name.startswith(b) for f in self.scenes)]:
            raise UserError(f"no scene of assets/scenes begins with {unknown[0]!r}")
        return [f for f in self.scenes if f.name.startswith(beginnings)]

    def phrasings(self, lines, key=lambda line: line, scene=False):
        """The lines of this split: in training none that is held out, as long as three others are left. Scenes are for training, whole."""
        if scene:
            return lines
        seen = [line for line in lines if not held_out(key(line))]
        return seen if self.split == "train" and len(seen) >= 3 else lines

    def value(self, kind, rng, depth=0):
        """A value of a word list, its own {braces} expanded."""
        def expand(match):
            inner = match[1]
            if "-" in inner:
                low, high = inner.split("-")
                return str(rng.randint(int(low), int(high)))
            word = self.value(inner[0].lower() + inner[1:], rng, depth + 1)
            return " ".join(w[:1].upper() + w[1:] for w in word.split(" ")) if inner[0].isupper() else word
        line = rng.choice(self.words[kind] if isinstance(kind, str) else kind)
        return re.sub(r"\{([\w-]+)\}", expand, line) if "{" in line else line

    def let_wild(self, tokenizer, share):
        """Draw a share of the values from the tokenizer instead of their list, half of them whole words, half words put together
        from two to four tokens: what a value is then says nothing about the word it is, and the hypernetwork must copy tokens that it
        never met in that place or in that order. Held-out words stay out."""
        spared = {w for kind, lines in load_assets(ASSETS)[0].items() if open_class(lines) for line in lines if held_out(line) for w in line.lower().split()}
        words, self.wild_share = [token.decode("utf-8", "replace") for token in tokenizer.ranks], share
        self.wild = sorted({w[1:].lower() for w in words if re.fullmatch("[ ][A-Za-z][a-z]{2,}", w)} - spared)
        self.wild_parts, self.spared = sorted(w for w in words if re.fullmatch("[a-z]{2,}", w)), spared

    def wild_word(self, rng):
        """A whole word of the tokenizer, or the start of one with one or two tokens behind it; never a held-out word."""
        word = rng.choice(self.wild)
        if self.wild_parts and rng.random() < 0.5:
            word = word[:rng.randint(2, 6)] + "".join(rng.choice(self.wild_parts) for _ in range(rng.choice((1, 1, 2))))
        return self.wild[0] if word in self.spared else word

    def let_exchange(self, share):
        """Draw a share of the values that come from a scene's own list from the lists of all scenes, among those that look alike: eight
        values are soon known by heart, and a scene that is known then says which of eight, not what."""
        self.exchange_share, self.alike = share, {}
        for line in sorted({line for scene in self.scenes for kind in scene.slots.values() if isinstance(kind, tuple) for line in kind}):
            self.alike.setdefault(outline(line), []).append(line)

    def fresh(self, kind, rng, used):
        for _ in range(20):
            if self.exchange_share and isinstance(kind, tuple) and rng.random() < self.exchange_share:
                value = self.value(self.alike[outline(rng.choice(kind))], rng)
            else:
                value = self.value(kind, rng)
            if self.wild and isinstance(kind, str) and open_class(load_assets(ASSETS)[0][kind]) and rng.random() < self.wild_share:
                word = self.wild_word(rng)
                value = word[:1].upper() + word[1:] if value[:1].isupper() else word
            if value.lower() not in used:
                break
        used.add(value.lower())
        return value

    def make_cast(self, rng, used):
        people = []
        for i in range(rng.choice((1, 1, 2, 2, 2, 3))):
            if i == 0 and rng.random() < 0.12:
                people.append(Character("person", "I", "I"))
                continue
            gender = rng.choice("fm")
            kind = "newname" if rng.random() < 0.15 else {"f": "names_female", "m": "names_male"}[gender]
            people.append(Character("person", self.fresh(kind, rng, used), gender))
        pets = [Character("pet", self.fresh("petname" if rng.random() < 0.8 else "newname", rng, used), rng.choice(("f", "m", "it")))
                for _ in range(2)]
        towns = [Character("town", self.fresh(rng.choice(("city", "newplace")), rng, used), "it") for _ in range(2)]
        return {"person": people, "pet": pets, "town": towns}

    def make_fact(self, frame, cast, rng, used, taken):
        """Fill a frame, or None when its cast is too small or its topic was used for this hero."""
        values = {}
        for slot in frame.cast:
            free = [c for c in cast[frame.slots[slot]] if c not in values.values()
                    and not (c.gender == "I" and slot != frame.cast[0])]
            if not free and frame.slots[slot] == "person" and len(cast["person"]) < CAST["person"]:
                gender = rng.choice("fm")
                free = [Character("person", self.fresh({"f": "names_female", "m": "names_male"}[gender], rng, used), gender)]
                cast["person"] += free
            if not free:
                return None
            values[slot] = rng.choice(free)
        key = (frame.topic, values[frame.cast[0]] if frame.cast else frame.name)
        if key in taken:
            return None
        taken.add(key)
        for slot in frame.values:
            values[slot] = self.fresh(frame.slots[slot], rng, used)
        return Fact(frame, values, choose(rng.choice(self.phrasings(frame.statements, scene=frame.scene)), rng))

    def fill(self, line, values, pronoun_for=None, answer=False, changed=()):
        """Put values into a template; `pronoun_for`: the character whose first mention becomes a pronoun."""
        first_person = any(isinstance(v, Character) and v.gender == "I" for v in values.values())
        line = re.sub(r"\b([\w']+)/([\w']+)\b", lambda m: m[2] if first_person else m[1], line)

        def put(match):
            nonlocal pronoun_for
            value, form = values[match[1]], match[2] or ""
            if not isinstance(value, Character):
                value = value.split("|")[form == ".ed"] if "|" in value else value
                return value[:1].upper() + value[1:] if form == "^" else value
            if value is pronoun_for and form in value.pronoun:
                pronoun_for = None
                return value.pronoun[form]
            if form == ".it" and not CLAUSE.search(line[:match.start()]):     # not where a clause starts: the object
                return value.pronoun[".o"]
            return value.forms["answer" if answer and not form else form]
        return mend(SLOT.sub(put, line), sentence=not answer)

    def text(self, facts, rng):
        """Statements in random order; a subject said in the sentence before may become a pronoun."""
        parts, before = [], None
        for fact in facts:
            hero, line = fact.hero, fact.statement
            heroes = [v for v in fact.values.values() if isinstance(v, Character)]
            starts = hero and line.startswith(("{" + fact.frame.cast[0] + "}", "{" + fact.frame.cast[0] + "'s}"))
            swap = starts and hero is before and hero.gender != "I" and rng.random() < 0.5
            parts.append(self.fill(line, fact.values, hero if swap else None))
            before = hero if len(heroes) == 1 else None
        return ("\n" if rng.random() < 0.08 else " ").join(parts)

    def questions(self, facts, rng):
        """All questions the facts answer: [(question line, answer, fact, check, [follow-ups])]; one with two answers is left out."""
        asked, answers = [], defaultdict(set)
        for fact in facts:
            for line, answer, more in self.phrasings(fact.frame.questions, lambda question: question[0], fact.frame.scene):
                if fact.says(line + answer):
                    line, answer = choose(line, rng), self.fill(answer, fact.values, answer=True)
                    answers[self.fill(line, fact.values)].add(answer)
                    asked.append((line, answer, fact, False, [(choose(line, rng), self.fill(answer, fact.values, answer=True), fact, False, [])
                                                              for line, answer in more if fact.says(line + answer)]))
            for line in fact.frame.checks:
                if fact.says(line):
                    asked.append((choose(line, rng), "yes", fact, True, []))
        return [q for q in asked if q[3] or len(answers[self.fill(q[0], q[2].values)]) == 1]

    def ask(self, item, rng, cast, before, used):
        """One question of `questions` as a user types it -> (question, answer). `before` is the item asked just before."""
        line, answer, fact, check, _ = item
        values = fact.values
        if check and rng.random() < 0.5:
            slots = [m[1] for m in SLOT.finditer(line) if m[1] in fact.frame.values]
            if slots:
                values, answer = values | {slots[-1]: self.fresh(fact.frame.slots[slots[-1]], rng, used)}, "no"
        slots = [m[0] for m in SLOT.finditer(line)]
        hero = fact.hero
        if owned(before, item) and rng.random() < 0.6:
            owner = hero if hero.gender in "fm" and rng.random() < 0.7 else None
            return rng.choice(("And {}?", "and {}?", "What about {}?")).format(self.fill(OWNED.match(line)[2], values, owner, answer=True)), answer
        if before and before[0] == line and before[2] is not fact and hero and hero.gender != "I" and len(slots) == 1 and rng.random() < 0.6:
            return rng.choice(("And {}?", "What about {}?", "How about {}?", "and {}?")).format(self.fill(slots[0], values).rstrip(".")), answer
        alone = len(cast["person"]) == 1 and rng.random() < 0.15
        same = before and before[2].hero is hero and rng.random() < 0.4
        persons = {v for v in values.values() if isinstance(v, Character) and v.kind == "person"}
        pronoun = hero if hero and hero.gender in "fm" and hero.kind == "person" and (alone or same) and len(persons) == 1 else None
        return self.fill(line, values, pronoun), answer

    def unanswerable(self, facts, rng, used):
        """A question that nothing in the text answers: another topic, or a person who is not in it; of a scene one of its own."""
        if own := [(line, fact) for fact in facts for line in fact.frame.unsaid if fact.says(line)]:
            line, fact = rng.choice(own)
            return self.fill(choose(line, rng), fact.values)
        if any(fact.frame.scene for fact in facts):
            return None
        topics = {fact.frame.topic for fact in facts}
        frame = rng.choice(self.frames)
        stranger = rng.random() < 0.4 or not frame.cast
        if stranger:
            frame = rng.choice(facts).frame
            if not frame.cast:
                return None
        elif frame.topic in topics:
            return None
        lines = [q for q, *_ in frame.questions if {m[1] for m in SLOT.finditer(q)} == {frame.cast[0]}]
        if not lines:
            return None
        kind = frame.slots[frame.cast[0]]
        aside = {fact.values[slot] for fact in facts for slot in fact.frame.cast[1:]}      # of these the text says more
        free = [c for c in self.make_cast(rng, set(used))[kind] if c.gender != "I" and c.name.lower() not in used] if stranger else \
               [fact.hero for fact in facts if fact.hero and fact.hero.kind == kind and fact.hero not in aside]
        return self.fill(rng.choice(self.phrasings(lines)), {frame.cast[0]: rng.choice(free)}) if free else None

    def sample(self, rng, n_facts=None, n_turns=None, others=(), again=0.35):
        """One text with a conversation: {"context", "conversations", "meta": {"facts", "turns": [kind]}}.

        others: the numbers of questions of more conversations about the same text, which come under the key "others".
        again: how often a fact is of a kind that the text has already, about someone else.
        """
        while True:
            used, taken, facts = set(), set(), []
            cast = self.make_cast(rng, used)
            if self.scene_share and rng.random() < self.scene_share:
                cast["person"] = [c for c in cast["person"] if c.gender != "I"]
                facts = [fact for fact in [self.make_fact(rng.choice(self.scenes), cast, rng, used, taken)] if fact]
            n = n_facts or rng.randint(1, self.max_facts)
            pool = self.by_cast[rng.choices(("person", "other", "all"), (5, 3, 3))[0]]
            while not (facts and facts[0].frame.scene) and sum(fact.frame.facts for fact in facts) < n:
                same = facts and rng.random() < again
                frame = rng.choice(facts).frame if same else rng.choice(pool)
                fact = self.make_fact(frame, cast, rng, used, taken)
                if fact and sum(f.frame.facts for f in facts) + frame.facts <= n + 1:
                    facts.append(fact)
                elif same and rng.random() < 0.5:
                    pool = self.frames
            if facts and facts[0].frame.scene and self.company_share and rng.random() < self.company_share:      # before or behind it facts about others
                company = self.make_cast(rng, used)
                company["person"] = [c for c in company["person"] if c.gender != "I"]
                for _ in range(rng.randint(1, 3)):
                    fact = self.make_fact(rng.choice(self.by_cast["person"]), company, rng, used, taken)
                    facts += [fact] if fact else []
                cast = {kind: cast[kind] + company[kind] for kind in cast}
            rng.shuffle(facts)
            items = self.questions(facts, rng)
            if items:
                break
        context = self.text(facts, rng)
        turns, kinds = self.converse(facts, items, rng, cast, used, n_turns or rng.randint(1, 8))
        sample = {"context": context, "conversations": turns, "meta": {"facts": sum(fact.frame.facts for fact in facts), "turns": kinds}}
        if others:
            sample["others"] = [self.converse(facts, items, rng, cast, used, n)[0] for n in others]
        return sample

    def converse(self, facts, items, rng, cast, used, n_turns):
        """Up to n_turns questions with answers -> ([{"role", "content"}], [kind of each question])."""
        turns, kinds, before, then = [], [], None, []
        checks, items = [q for q in items if q[3]], [q for q in items if not q[3]]
        for _ in range(n_turns):
            dice = rng.random()
            if then:      # a follow-up stands behind its question
                kind, item = "fact", then.pop(0)
                question, answer = self.ask(item, rng, cast, None, used)
            elif dice < 0.08 and (question := next(filter(None, (self.unanswerable(facts, rng, used) for _ in range(6))), None)):
                kind, answer, item = "unknown", UNKNOWN, None
            elif 0.08 <= dice < 0.11:
                kind, item = "small talk", None
                question, answer = rng.choice(small_talk())
            elif 0.11 <= dice < 0.13 and any(f.hero for f in facts) and not any(f.frame.scene for f in facts):
                kind, item = "about", None
                names = list(dict.fromkeys(f.hero.forms["answer"] for f in facts if f.hero))
                question = rng.choice(("Who or what is the text about?", "What is the text about?", "What is it about?"))
                answer = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
            elif 0.13 <= dice < 0.20 and checks:
                kind, item = "yes or no", rng.choice(checks)
                question, answer = self.ask(item, rng, cast, before, used)
            elif items:
                follow = [q for q in items if before and (q[0] == before[0] and q[2] is not before[2] or owned(before, q))]
                item = rng.choice(follow) if follow and rng.random() < 0.6 else rng.choice(items)
                items.remove(item)
                kind, then = "fact", list(item[4]) if item[4] and rng.random() < 0.7 else []
                question, answer = self.ask(item, rng, cast, before, used)
            else:
                break
            before = None if kind == "unknown" else item or before
            turns += [{"role": "user", "content": casual(question, rng)}, {"role": "assistant", "content": answer}]
            kinds.append(kind)
        return turns, kinds


def owned(before, item):
    """Whether two questions in turn ask for two things of one owner in the same words: then the second may name the thing only."""
    first, second = (q and OWNED.fullmatch(q[0]) for q in (before, item))
    return bool(first and second and item[2].hero and before[2].hero is item[2].hero and first[2] != second[2] and first.group(1, 3) == second.group(1, 3))


def choose(line, rng):
    """[this|that] -> one of the two."""
    return re.sub(r"\[([^][]*\|[^][]*)\]", lambda m: rng.choice(m[1].split("|")), line)


def mend(text, sentence=True):
    """a -> an before a vowel; capitals at the start of sentences."""
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|usu|eu|Eu|ewe|one\b|once|Uni|ukulele|ute)", r"\1n ", text)
    text = re.sub(r"\b([Aa]) (?=hour|honest|heir)", r"\1n ", text)
    return re.sub(r"(^|[.!?:]\s+|\n)([a-z])", lambda m: m[1] + m[2].upper() if m[1][:1] != ":" else m[0], text) if sentence else text


def casual(question, rng):
    """Questions as people type them: sometimes no capital, no question mark."""
    dice = rng.random()
    if dice < 0.06:
        question = question[:1].lower() + question[1:] if not question.startswith("I ") else question
    elif dice < 0.09:
        question = question.lower()
    return question.rstrip("?") if rng.random() < 0.07 else question


DIGITS = {word: str(i) for i, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)}
SHORT = {"kilometres": "km", "metres": "m", "centimetres": "cm", "millimetres": "mm", "kilograms": "kg", "kilos": "kg", "grams": "g", "litres": "l", "feet": "ft",
         "minutes": "min", "hours": "h", "seconds": "s", "percent": "%", "degrees": "°C", "dollars": "$", "euros": "€", "pounds": "£"}
ACCENTS = {"a": "áàäâãå", "c": "çč", "e": "éèêëę", "g": "ğ", "i": "íîï", "l": "ł", "n": "ñń", "o": "óöôõø", "s": "šş", "u": "úüû", "y": "ý", "z": "žż"}
MONTHS = "January February March April May June July August September October November December".split()
MONEY = re.compile(r"\b(\d[\d,]*(?:\.\d+)?)( thousand| million)? (dollars|euros|pounds)\b")
UNIT = re.compile(rf"\b(minus )?(\d[\d,]*(?:\.\d+)?) ({'|'.join(unit for unit, sign in SHORT.items() if sign not in '$€£')})\b")
PRICED = re.compile(r"\b(cost|costs|pay|pays|paid|price|spent|spend|earn|earns|sell|sells|sold|buy|bought|worth|ticket|tickets|fee|rent|saved|money)\b")
TITLE, DAY, HOUR = re.compile(r"\b(Mr|Mrs|Ms|Dr|Professor|Captain|St) (?=[A-Z])"), re.compile(rf"\b(\d{{1,2}}) ({'|'.join(MONTHS)})\b"), re.compile(r"\b(\d{1,2}(?::\d\d)?) ?([ap]m)\b\.?")


def typist(context, rng):
    """How somebody writes what the word lists spell out: a function of a string (and whether it is a question), for a text and what is said
    about it. Prices, units, titles, dates and hours short or in digits, each or not; an accent in a name; curved quotation marks; seldom all
    in small letters.

    >>> typist("Mrs Li paid.", random.Random(170))("Mrs Li drove 12 kilometres at 5:30 pm and paid two pounds.")
    'Mrs. Li drove 12 km at 5.30 p.m. and paid £2.'
    """
    gap, behind, point, noon = rng.choice(("", " ")), rng.random() < 0.3, rng.choice(":.."), rng.choice((" am", "am", " a.m.", " AM"))
    order = rng.choice(("{1} {0}", "{0} {2}", "{2} {0}", "{1} {0}{3}", "{0}{3} {1}"))      # {0} day, {1} month, {2} its first letters, {3} th
    pounds = PRICED.search(context)      # else they may be a weight
    kept = {UNKNOWN, *(reply for _, reply in small_talk())}

    def money(m):
        amount, many, sign = m[1], m[2] or "", SHORT[m[3]]
        if sign == "£" and not pounds:
            return m[0]
        if many == " thousand" and amount.isdigit():
            amount, many = amount + ",000", ""
        return f"{amount}{many} {sign}" if behind and sign == "€" else f"{sign}{amount}{many}"

    def day(m):
        return order.format(m[1], m[2], m[2][:3], {"1": "st", "2": "nd", "3": "rd"}.get(m[1][-1], "th") if m[1] not in ("11", "12", "13") else "th")
    rules = [rule for rule in (
        (re.compile(rf"(?<![\w-])({'|'.join(DIGITS)})(?![\w-])"), lambda m: DIGITS[m[0]]),
        (MONEY, money),
        (UNIT, lambda m: ("-" if m[1] else "") + m[2] + gap + SHORT[m[3]]),
        (TITLE, lambda m: {"Professor": "Prof", "Captain": "Capt"}.get(m[1], m[1]) + ". "),
        (DAY, day),
        (HOUR, lambda m: m[1].replace(":", point) + (noon if m[2] == "am" else noon.replace("a", "p").replace("A", "P")) + ("." if m[0][-1] == "." and noon[-1] != "." else "")),
        (re.compile(r"(?<=\d):(?=\d\d)"), lambda m: point),
        *accented(context, rng),
        (re.compile("'"), lambda m: "’"),
        (re.compile('"([^"]*)"'), r"“\1”")) if rng.random() < 0.7]
    small, small_too = rng.random() < 0.15, rng.random() < 0.5

    def typed(text, question=False):
        if text in kept:
            return text
        for pattern, by in rules:
            text = pattern.sub(by, text)
        return text.lower() if small and (small_too or not question) else text
    return typed


def accented(context, rng):
    """[(pattern, replacement)]: a letter of a name in the text gets an accent, wherever the name stands."""
    names = sorted({name for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", context) if name not in MONTHS and name[-3:] != "day"})
    places = [(name, i) for name in names for i in range(1, len(name)) if name[i] in ACCENTS]
    if not places:
        return []
    name, i = rng.choice(places)
    return [(re.compile(rf"\b{name}\b"), name[:i] + rng.choice(ACCENTS[name[i]]) + name[i + 1:])]


@lru_cache(maxsize=None)
def small_talk(folder=ASSETS):
    """[(what the user says, the reply)] from assets/small_talk.txt."""
    return [tuple(line.split(" = ", 1)) for line in read_lines(folder / "small_talk.txt")]


# ---------------------------------------------------------------------------- real data
def read_texts(path):
    """Documents of a .txt or .txt.xz file, or of all such files of a folder; a line <|endoftext|> ends one. -> [str]"""
    if not Path(path).exists():
        raise UserError(f"{path} is not there: give a folder of .txt or .txt.xz files, or one of them")
    paths = sorted(p for p in (Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]) if p.name.endswith((".txt", ".txt.xz")))
    if not paths:
        raise UserError(f"{path} {'holds no' if Path(path).is_dir() else 'is not a'} .txt or .txt.xz file")
    documents = []
    for path in paths:
        try:
            with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
                documents += [d.strip() for d in file.read().split("<|endoftext|>") if d.strip()]
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return documents


def read_conversations(path, strict=False, say=lambda line: print(line, file=sys.stderr)):
    """JSON lines {"context", "conversations": [{"role", "content"}, ...]} -> [dict]; broken lines are named and counted."""
    def check(record):
        if not isinstance(record.get("context"), str) or not record["context"].strip():
            return "no context"
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            return "conversations is not a list of question and answer in turn"
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict) or turn.get("role") != ("user", "assistant")[i % 2] or not isinstance(turn.get("content"), str):
                return f"turn {i} is not {{'role': '{('user', 'assistant')[i % 2]}', 'content': text}}"
        accept = record.get("accept")
        if accept is not None and not (isinstance(accept, list) and len(accept) == len(turns) // 2 and all(
                isinstance(a, list) and a and all(isinstance(s, str) for s in a) for a in accept)):
            return "accept is not one list of right answers a question"
        return None

    records, skipped = [], 0
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            wrong = check(record) if isinstance(record, dict) else "not a JSON object"
        except (ValueError, RecursionError) as error:
            wrong = f"not JSON ({error})"
        if wrong is None:
            records.append(record)
        elif strict:
            raise UserError(f"{path}, line {number}: {wrong}")
        else:
            skipped += 1
            say(f"{path}, line {number}: {wrong}; skipped")
    if skipped:
        say(f"{path}: {skipped} of {skipped + len(records)} lines skipped")
    if not records:
        raise UserError(f"{path} holds no usable conversation")
    return records


def excerpt(context, pairs, size, rng):
    """Some sentences in a row of a text that is longer than `size` characters, and the (question, answer) pairs whose answers
    stand in them word for word. A short text comes back whole, and so does one where ten tries find no question."""
    if len(context) <= size:
        return context, pairs
    sentences = sentences_of(context)
    for _ in range(10):
        first = last = rng.randrange(len(sentences))
        while last < len(sentences) and sum(map(len, sentences[first:last + 1])) <= size:
            last += 1
        piece = " ".join(sentences[first:last])
        if kept := [pair for pair in pairs if pair[1][1].rstrip(".").lower() in piece.lower()]:
            return piece, kept
    return context, pairs


# ---------------------------------------------------------------------------- questions on any plain text
class Miner:
    """Questions that simple sentences of a real text answer, found by their form: subject, verb, object, place.

    What is not sure is not asked: a list that goes on, speech, a relative clause, a question with two answers in the text.

    >>> Miner()("Once a sly fox stole a cheese from the kitchen.")[:2]
    [('Who stole a cheese from the kitchen?', 'a sly fox'), ('What did the sly fox steal from the kitchen?', 'a cheese')]
    """
    words = lambda text: frozenset(text.split())      # noqa: E731
    PRONOUNS = words("i we you he she it they")
    ARTICLES = words("a an the his her my our their its your some all many no")
    NUMBERS = words("two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty "
                    "forty fifty sixty seventy eighty ninety hundred")
    COMMON = PRONOUNS | ARTICLES | NUMBERS | words(          # what a capital at the start of a sentence does not make a name
        """after although and another are as at because before both but by can could did do does during each every few for from had has have
        here how if in is just last let may more most much never next nobody not now of oh on once one only or perhaps she should since so such
        suddenly than that them then there these this those though through thus to today tomorrow too under until up upon was well were what when
        where which while who whose why will with yes yesterday yet""")
    PREPOSITIONS = words("in on at under near behind beside inside into onto to from with for by over through across around outside above below "
                         "between after before about along down up out off during until against without toward towards")
    CLAUSES = "and|but|because|when|while|so|that|which|who|as|if|where|though|although|until|than|then|whom|whose"      # what starts another one
    FEELINGS = ("happy|sad|angry|afraid|scared|tired|hungry|thirsty|proud|glad|sorry|lonely|surprised|excited|frightened|worried|jealous|bored|cross|ill|"
                "sick|delighted|ashamed|curious")
    ADVERBS = words("again away back ever first here home now once soon then there together too")
    WISHES = words("wanted liked loved learned started needed wants likes loves needs")
    TIMES = words("morning afternoon evening night day week month year time moment hour minute winter summer spring autumn while end way")
    PLACES = {"in": "", "at": ""} | {p: p + " " for p in ("on", "under", "near", "behind", "beside", "inside")}      # what of them the answer repeats
    GOING = words("go come walk run fly move travel ride drive sail hurry climb swim jump fall")
    MODALS = "can|could|will|would|must|should|may|might"
    PARTICIPLES = words("""beaten bitten born broken brought bought built burnt caught chosen cut done drawn driven eaten felt forgotten found frozen given grown heard held hidden kept
        known left lent lost made paid put read said seen sent shown sold spent stolen taken taught told thrown torn won worn written""")
    UNITS = words("second seconds minute minutes hour hours day days night nights week weeks month months year years")
    CALENDAR = words("""Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August September October November December
        spring summer autumn winter morning afternoon evening night midnight noon Christmas Easter weekend""")
    MEASURED = {"cost": "How much", "weigh": "How much", "take": "How long", "last": "How long"}      # what asks for the number behind these verbs
    ANIMATE = ("being", "job", "animal", "role", "relation", "expert")      # lists of assets/words whose last words are somebody, not something
    SOMEBODY = words("""man woman boy girl child children people men women lady gentleman baby prince princess queen king giant witch wizard fairy dwarf elf troll dragon puppy kitten hen
        cock bird lion tiger bear monkey snake crow soldier captain sailor servant miller hunter thief robber stranger guest mayor lord knight merchant beggar shepherd tailor cook
        grandfather grandmother grandma grandpa mum dad mother father parents aunt uncle twin son daughter boss owner student pupil
        mummy daddy mommy""")
    THINGS_CALLED = words("village town city river lake island mountain country ship boat spaceship planet moon star house street farm school castle forest band club")
    del words

    NAME = rf"(?:(?:Mr|Mrs|Ms|Dr|Prof|Rev|Capt|St){POINT} )?[A-Z][a-z]+(?: [A-Z][a-z]+)*"
    ARTICLE = r"(?:[Tt]he|[Aa]n?|[Hh]is|[Hh]er|[Mm]y|[Oo]ur|[Tt]heir|[Ii]ts|[Yy]our|[Ss]ome)"
    PREPOSITION = "(?:" + "|".join(sorted(PREPOSITIONS)) + ")"
    START = (r"^(?:(?P<lead>(?:One|Every|Each|Last|Next|On|In|At|After|Before|During|Since|Until|By)\b[^,.;:!?]{2,30}(?=,)|Yesterday|Today|Tomorrow),? |"
             r"(?:Then|So|But|And|Soon|Once|Now|At last|Finally|Suddenly|However),? )?"
             rf"(?P<subject>{NAME}|{ARTICLE}(?: [a-z-]+){{1,3}}?(?: {NAME})?|He|She|They|We|I|It|he|she|they|we|it) ")
    NO_TIME = re.compile("At (?:last|first|once|least)|In (?:fact|short|all)")
    STOP = re.compile(rf" (?:{CLAUSES})\b|[.;!?:,\"(]| --")
    THING = re.compile(rf"(?:{ARTICLE}|all|many|no|{'|'.join(sorted(NUMBERS))}|\d[\d,{POINT}]*)(?: [\w'-]+){{1,4}}|{NAME}")
    SPLIT = re.compile(r"[,;] (?:and|but|so|for) |[,;] (?=(?:when|while|because|where) )|(?<=[a-z]) (?:when|while|because) |; ")
    NAMED = re.compile(rf"\b{ARTICLE}(?: [a-z-]+){{0,2}}? (?P<kind>[a-z-]+),? (?:who was |which was |whose name was )?(?:named|called) (?P<name>{NAME})")
    APPOSED = re.compile(rf"\b(?P<before>{ARTICLE}(?: [a-z-]+)?? )(?P<kind>[a-z-]+)(?: (?P<name>{NAME})|, (?P<aside>{NAME}),)")
    EPITHET = re.compile(rf"(?<=[a-z,] )(?P<name>{NAME}) (?P<kind>the [a-z-]+)(?=[ ,.;])")
    IS = re.compile(START + rf"(?P<verb>was|were|is|are|(?:{MODALS}) be|ha[sd] been|have been) (?P<rest>[^.;!?:]*)")
    THERE = re.compile(rf"^(?:In [^,.;:!?]{{2,30}},? )?[Tt]here (?P<verb>was|were|is|are) (?P<rest>[^.;!?:]*)")

    def __init__(self, folder=ASSETS):
        pairs = [line.split("|") for line in read_lines(folder / "verbs.txt")]
        self.base = {third(base): (base, "does") for base, _ in pairs} | {past: (base, "did") for base, past in pairs}
        verbs, bases = ("|".join(sorted(forms, key=len, reverse=True)) for forms in (self.base, (base for base, _ in pairs)))
        self.does = re.compile(self.START + rf"(?:also |always |often |once |soon |then |only |usually |still |just )?(?P<verb>(?:{self.MODALS}) (?:{bases})|{verbs})\b(?P<rest>[^.;!?:]*)")
        self.participles = self.PARTICIPLES | {past for _, past in pairs if past.endswith("ed")}
        nouns = {name: {line.split("|")[0].split()[-1] for line in read_lines(folder / f"words/{name}.txt")} for name in self.ANIMATE}
        self.animals, self.somebody = nouns["animal"], self.SOMEBODY.union(*nouns.values()) - {"hand"}      # a farm hand

    def __call__(self, text):
        """-> [(question, answer)] of the questions with one answer"""
        return self.sure(self.asked(text))

    @staticmethod
    def sure(asked):
        """{question: [answers]} -> [(question, answer)] of those with one"""
        return [(question, answers[0]) for question, answers in asked.items() if len(answers) == 1]

    def asked(self, text):
        """-> {question: [answers that the text gives]}"""
        asked = defaultdict(list)
        for sentence in sentences_of(text):
            for question, answer in self.ask(points(sentence)):
                question, answer = question[:1].upper() + question[1:].replace(POINT, "."), answer.replace(POINT, ".")
                if 0 < len(answer.split()) <= 12 and answer not in asked[question]:
                    asked[question].append(answer)
        return asked

    def ask(self, sentence):
        """(question, answer) after (question, answer) of one sentence."""
        for m in self.NAMED.finditer(sentence):
            if m["kind"] not in self.COMMON:
                yield f"What was the {m['kind']} called?", m["name"]
                yield f"What is the name of the {m['kind']}?", m["name"]
        for m in self.APPOSED.finditer(sentence):
            before, kind, name = m["before"], m["kind"], m["name"] or m["aside"]
            if (kind in self.somebody or kind in self.THINGS_CALLED) and name.split()[0] not in self.CALENDAR and name.split()[0].lower() not in self.COMMON:
                the = self.again(before.strip()) + " " + kind
                for question in (f"What was {the} called?", f"What is {the} called?", f"What is the name of {the}?"):
                    yield question, name
                if kind in self.somebody:
                    yield f"Who was {name}?", self.lower(before) + kind
                    if m["aside"]:
                        yield f"Who is {the}?", name
        for m in self.EPITHET.finditer(sentence):
            if m["kind"].split()[-1] in self.somebody and m["name"].split()[0].lower() not in self.COMMON:
                yield f"Who was {m['name']}?", m["kind"]
        if '"' in sentence:
            return
        lead = ""
        for clause in self.clauses(sentence):
            if m := self.THERE.match(clause):
                yield from self.ask_there(m["verb"], *self.split(m["rest"]))
                continue
            for form, ask in ((self.IS, self.ask_is), (self.does, self.ask_does)):
                if m := form.match(clause):
                    if m["lead"] and not self.NO_TIME.match(m["lead"]):
                        lead = m["lead"]
                    if self.is_subject(m["subject"]):
                        yield from ask(m["subject"], m["verb"], lead, *self.split(m["rest"]))
                    break

    def clauses(self, sentence):
        """The sentence itself, of which the first clause is asked about, then what follows "and", "but", "because" and the like in it."""
        yield sentence
        behind = [m.end() for m in self.SPLIT.finditer(sentence)]
        if behind and (self.IS.match(sentence) or self.does.match(sentence)):
            for start in behind:
                clause = re.sub("^(?:when|while|because|where) ", "", sentence[start:])
                if not clause.startswith(("then ", "now ")):
                    yield clause

    def who(self, phrase, done_to=False):
        """Who or What asks for this phrase; what is done to an animal is done to What."""
        last = phrase.split()[-1].lower()
        named = set(phrase.split()[1:-1]) if phrase.split()[-1][0].isupper() else set()      # the giant Grumm
        if phrase.lower() in self.PRONOUNS or {last, last.removesuffix("s"), last.removesuffix("es"), *named} & (self.somebody - self.animals if done_to else self.somebody):
            return "Who"
        plural = re.fullmatch("[A-Z][a-z]+[^s]s", phrase)      # "Literals" at the start of a sentence, no name
        return "Who" if self.lower(phrase)[0].isupper() and phrase.split()[0].lower() not in self.COMMON and not plural else "What"

    def when(self, preposition, noun):
        """Whether "on Monday", "in the morning", "in 1954", "at seven" says when."""
        last = noun.split()[-1] if noun else ""
        return preposition in ("in", "on", "at") and (last in self.CALENDAR or preposition == "in" and bool(re.fullmatch(r"1\d{3}|20\d\d", noun)) or preposition == "at" and noun in self.NUMBERS)

    def ask_there(self, be, thing, preposition, noun, further, after):
        if self.is_thing(thing) and preposition in self.PLACES and self.is_thing(noun, place=True) and not re.match(" (and|or)", after):
            first, rest = thing.split(" ", 1) if " " in thing else (thing, "")
            yield f"{self.who(thing)} {'was' if be in ('was', 'were') else 'is'} {preposition} {noun}?", thing
            if first.lower() in ("a", "an", "some"):
                yield f"Where {be} the {rest}?", self.PLACES[preposition] + noun
            elif first in self.NUMBERS or first[0].isdigit():
                yield f"How many {rest} {be} {preposition} {noun}?", first

    def split(self, rest):
        """What follows the verb -> (object, preposition, the noun phrase behind it, more of these, the next clause); "" for what is not there."""
        stop = self.STOP.search(rest)
        here, after = (rest[:stop.start()], rest[stop.start():]) if stop else (rest, "")
        thing, *more = re.split(rf"(?:^|(?<=\s)){self.PREPOSITION}(?=\s\S)", here, maxsplit=2)
        preposition = here[len(thing):].split(" ")[0] if more else ""
        noun = more[0].strip() if more else ""
        return thing.strip(), preposition, noun, here[here.index(noun, len(thing)) + len(noun):].rstrip() if noun else "", after

    def is_thing(self, phrase, place=False):
        """Whether a phrase can be an answer: an article or number with a few words, or a name; a place: no time of day or year."""
        words = phrase.split()
        first = words[0].lower() if words else ""
        return bool(self.THING.fullmatch(phrase)) and words[-1] not in self.PREPOSITIONS | self.ADVERBS and words[-1][-2:] != "ly" and not (place and words[-1] in self.TIMES) \
            and (first in self.ARTICLES | self.NUMBERS or first not in self.COMMON)

    def is_subject(self, phrase):
        """Whether a phrase can be a subject: a pronoun, an article with a noun, a name that is no common word."""
        words = phrase.split()
        first, last = words[0].lower(), words[-1]
        if any(w in self.PREPOSITIONS or w in ("and", "or", "who", "that", "which", "of") for w in words):
            return False
        if len(words) == 1:
            return first in self.PRONOUNS or first not in self.COMMON and last[-3:] != "ing"
        if first in self.ARTICLES and last[0].isupper():      # the giant Grumm, not "the day Tom"
            return any(w in self.somebody or w in self.THINGS_CALLED for w in words[1:-1])
        return (first in self.ARTICLES or first not in self.COMMON) and last not in self.COMMON and (last[0].isupper() or last[-2:] != "ly")

    @classmethod
    def lower(cls, phrase):
        """A phrase in the middle of a sentence: "The fox" -> "the fox"; names stay."""
        first = phrase.split(" ")[0]
        return phrase[:1].lower() + phrase[1:] if first.lower() in cls.COMMON and first != "I" else phrase

    def again(self, subject):
        """A subject inside a question: "a fox" has become "the fox"."""
        first, *more = subject.split()
        return " ".join(["the", *more]) if first.lower() in ("a", "an", "some") else self.lower(subject)

    def ask_is(self, subject, be, lead, thing, preposition, noun, further, after):
        pronoun, who, past = subject.lower() in self.PRONOUNS, self.again(subject), be in ("was", "were")
        helper, _, rest = be.partition(" ")      # "must be" asks "What must ... be", "was" asks "What was ..."
        singular = {"were": "was", "are": "is", "have": "has"}.get(helper, helper) + (" " + rest if rest else "")
        is_who = f"{helper} {who}" + (" " + rest if rest else "")
        first, *others = thing.split() or [""]
        asks = self.who(subject)
        if subject.endswith(" name"):
            if self.is_thing(thing) and not preposition:
                yield f"What {be} {who}?", thing
        elif re.fullmatch(rf"(?:very |so |too )?(?:{self.FEELINGS})", thing) and not preposition and not rest:
            yield f"How {'did' if past else 'does' if be == 'is' else 'do'} {who} feel?", thing.split()[-1]
            if not pronoun:
                yield f"Who {singular} {thing}?", self.lower(subject)
            if after.startswith(" because "):
                yield f"Why {be} {who} {thing}?", after.strip(" .,")
        elif first in self.participles and not others:
            tail = f" {preposition} {noun}".rstrip() if self.is_thing(noun) else ""
            if not pronoun:
                yield f"{asks} {singular} {thing}?", self.lower(subject)
                if tail:
                    yield f"{asks} {singular} {thing}{tail}?", self.lower(subject)
            if preposition == "by" and self.is_thing(noun) and not self.when("at", noun):
                yield f"{self.who(noun)} {is_who} {thing} by?", noun
            elif preposition in self.PLACES and self.is_thing(noun, place=True):
                yield f"Where {is_who} {thing}?", self.PLACES[preposition] + noun
            if self.when(preposition, noun):
                yield f"When {is_who} {thing}?", f"{preposition} {noun}"
            elif lead:
                yield f"When {is_who} {thing}?", self.lower(lead)
        elif (first in self.NUMBERS or first.isdigit()) and others in ([], ["years", "old"]) and not rest and not preposition and (pronoun or self.who(subject) == "Who") and who != "it":
            yield f"How old {be} {who}?", thing
        elif self.is_thing(thing) and not pronoun and not preposition and not rest and not re.match(" (and|that|which|who)", after):
            if past:
                yield f"{asks} {singular} {thing}?", self.lower(subject)
            yield f"What {be} {who if past else self.lower(subject)}?", thing
            if self.who(subject) == self.who(thing) == "Who":
                yield f"Who {be} {who}?", thing
        elif not thing and preposition in self.PLACES and self.is_thing(noun, place=True):
            yield f"Where {is_who}?", self.PLACES[preposition] + noun
            if not pronoun:
                yield f"{asks} {singular} {preposition} {noun}?", self.lower(subject)
        elif thing and not others and not preposition and not pronoun and first.islower() and first.isalpha() and first not in self.COMMON | self.ADVERBS and first[-2:] != "ly" and first[-3:] != "ing" \
                and not rest and not re.match(" (and|or|that|to|as)", after):
            yield f"{asks} {singular} {thing}?", self.lower(subject)      # the kitchen is tiny
            if after.startswith(" because "):
                yield f"Why {be} {who} {thing}?", after.strip(" .,")

    def ask_does(self, subject, verb, lead, thing, preposition, noun, further, after):
        modal, _, base = verb.rpartition(" ")
        (base, did), who, pronoun = (base, modal) if modal else self.base[verb], self.again(subject), subject.lower() in self.PRONOUNS
        if did == "does" and subject.lower() in ("they", "we", "i"):
            return
        tail = f" {preposition} {noun}".rstrip()
        if base == "have" and thing.split(" ")[0] in self.participles | {"not", "been", "never"}:      # had stopped
            if not pronoun and self.is_thing(thing.partition(" ")[2]):
                yield f"{self.who(subject)} {verb} {thing}?", self.lower(subject)
            return
        if verb in self.WISHES and preposition == "to" and not thing:
            if not self.is_thing(noun):
                yield f"What {did} {who} {base} to do?", noun + further
            return
        does = f"{did} {who} {base}" + (f" {thing}" if thing else "")
        if after.startswith(" because ") and "," not in after[:-1]:
            yield f"Why {does}{tail}?", after.strip(" .,")
        if after.startswith(" and ") and (after.split() + [""])[1] not in self.base.keys() | self.PRONOUNS | {"then"}:
            return                                                                   # a list that goes on
        if lead and (thing or noun):
            yield f"When {does}{tail}?", self.lower(lead)
        elif self.when(preposition, noun):
            yield f"When {does}?", f"{preposition} {noun}"
        first, rest = (thing + " ").split(" ", 1)
        if base in self.MEASURED and (first in self.NUMBERS or first[0:1].isdigit()) and rest.strip():
            yield f"{self.MEASURED[base]} {did} {who} {base}?", thing
        elif preposition == "for" and noun.split()[-1:] and noun.split()[-1] in self.UNITS:
            yield f"How long {does}?", noun
        elif self.is_thing(thing) and rest.strip() not in self.UNITS:
            asks = self.who(subject)
            for end in dict.fromkeys((tail, "")):
                if not pronoun:
                    yield f"{asks} {verb} {thing}{end}?", self.lower(subject)
                if first in self.NUMBERS or first[0].isdigit():
                    yield f"How many {rest.strip()} {did} {who} {base}{end}?", first
                yield f"{self.who(thing, True)} {did} {who} {base}{end}?", thing
            if preposition in self.PLACES and self.is_thing(noun, place=True):
                yield f"Where {does}?", self.PLACES[preposition] + noun
            elif (preposition in ("with", "from", "for") or preposition == "to" and self.who(noun) == "Who") and self.is_thing(noun):
                yield f"{self.who(noun, True)} {does} {preposition}?", noun
        elif not thing and self.is_thing(noun, place=True):
            if preposition in self.PLACES or preposition in ("to", "into") and base in self.GOING:
                yield f"Where {does}?", self.PLACES.get(preposition, "") + noun
            elif preposition in ("with", "for", "from"):
                yield f"{self.who(noun, True)} {does} {preposition}?", noun
            if not pronoun:
                yield f"{self.who(subject)} {verb}{tail}?", self.lower(subject)
        elif not pronoun and len((whole := f"{thing}{tail}{further}").split()) < 9 and after[:1] in (".", ";", ""):      # only who did it is sure
            yield f"{self.who(subject)} {verb} {whole.strip()}".strip() + "?", self.lower(subject)


def third(base):
    """The verb after he, she, it: carry -> carries, go -> goes, have -> has."""
    if base == "have":
        return "has"
    return base[:-1] + "ies" if base[-1] == "y" and base[-2] not in "aeou" else base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def sentences_of(text):
    """
    >>> sentences_of("At 4.30 p.m. Mrs. Li came. She had $2.50 left.")
    ['At 4.30 p.m. Mrs. Li came.', 'She had $2.50 left.']
    """
    return [sentence.replace(POINT, ".") for sentence in re.split(r"(?<=[.!?]) +|\n+", points(text))]


def points(text):
    """With POINT for each full stop that ends no sentence: of a number, of an abbreviation, of an initial."""
    return ABBREVIATION.sub(lambda m: m[0].replace(".", POINT), text)


# ---------------------------------------------------------------------------- examples and batches
class Examples:
    """Examples of a stage, each a pure function of (seed, index): a run can go on anywhere.

    stage "base":      (None, ids, weights): the text in a system turn
    stage "pretrain":  (context ids, ids, weights): reconstruction and completion, half each, and as many questions as `question_share` says; stage "gist" the same
    stage "finetune":  (context ids, ids, weights): questions
    texts: documents of plain text; records: conversations on real texts, one list a file. Both are mixed in by the shares below.
    """

    def __init__(self, stage, tokenizer, context_length=256, conversation_length=384, texts=(), records=(), seed=0, max_facts=8,
                 text_share=0.5, record_share=0.15, question_share=0.0, curriculum=0,
                 copy_share=0.2, plain_share=0.1, split="train", wild_share=0.0, packing=0.4, random_share=0.0, recall_share=0.0, rival_share=0.0,
                 conversations=1, max_turns=10, mined_share=0.0, scene_share=0.0, company_share=0.0, exchange_share=0.0, typed_share=0.0, skip_scenes=""):
        self.stage, self.tokenizer, self.seed = stage, tokenizer, seed
        self.context_length, self.conversation_length = context_length, conversation_length
        self.texts, self.records = texts, records
        self.text_share, self.record_share = text_share if texts else 0, record_share if records else 0
        self.question_share = question_share      # share of question examples in the pretrain stage
        self.source, self.max_facts = Source(split, max_facts), max_facts
        self.source.scene_share, self.source.company_share = scene_share, company_share
        if skip_scenes:                            # beginnings of names: left out, to test on them
            skipped = self.source.scenes_named(skip_scenes)
            self.source.scenes = [f for f in self.source.scenes if f not in skipped]
            if not self.source.scenes:
                raise UserError(f"{skip_scenes!r} leaves no scene to train on: take --scene-share 0 instead")
        if wild_share:
            self.source.let_wild(tokenizer, wild_share)
        if exchange_share:
            self.source.let_exchange(exchange_share)
        self.copy_share, self.plain_share = copy_share, plain_share if texts else 0      # of the base stage
        self.random_share = random_share          # share of passages that are tokens in random order
        self.mined_share, self.miner = mined_share if texts else 0, Miner()      # share of conversations on pieces of plain text
        self.long = [t for t in texts if len(t) > 400]
        self.recall_share = recall_share          # share of question examples that ask for the whole text too
        self.conversations = conversations        # about one text in a question example: at most so many, as far as they fit
        self.max_turns = max_turns                # questions of one conversation, at most 8 on a real text
        self.rival_share = rival_share            # share of generated texts whose facts are mostly of one kind, about several people
        self.typed_share = typed_share            # share of texts that are typed as a typist would
        self.packing = packing                    # chance that one more short text joins a reconstruction example
        self.curriculum = curriculum              # texts grow from 2 facts to max_facts over this many examples

    def __call__(self, index, before=None):
        """Example number `index`; before: examples that a run has met by then (default: index), for the curriculum."""
        before = index if before is None else before
        self.source.max_facts = min(self.max_facts, 2 + int(self.max_facts * before / self.curriculum)) if self.curriculum else self.max_facts
        rng = random.Random(self.seed * 1_000_003 + index)
        for _ in range(1000):
            context, ids, weights = getattr(self, self.stage)(rng)
            if len(ids) <= self.conversation_length + (self.context_length if context is None else 0) and any(weights) \
                    and (context is None or 0 < len(context) <= self.context_length):
                return context, ids, weights
        raise UserError(f"1,000 examples in a row are longer than --context-length {self.context_length} and "
                        f"--conversation-length {self.conversation_length} allow: raise them")

    def passage(self, rng, low=6, high=90, plain=False):
        """A run of words of a real document that ends with a sentence, a generated text, or (not if plain) random tokens."""
        if not plain and rng.random() < self.random_share:      # so that every token is met, and copied where nothing foretells it
            words = (self.tokenizer.decode([rng.randrange(self.tokenizer.end)]).strip() for _ in range(rng.randint(2, 24)))
            return " ".join(w if w and w.isprintable() and "\ufffd" not in w else "," for w in words)
        if rng.random() >= self.text_share:
            text = self.source.sample(rng, rng.choice((1, 1, 2, 2, 3, 4, 6)), 1)["context"]
            return typist(text, rng)(text) if self.typed_share and rng.random() < self.typed_share else text
        document = rng.choice(self.texts)
        start = rng.randrange(max(1, len(document) - 200))
        start = document.find(" ", start) + 1 if start else 0
        piece = document[start:start + rng.randint(low, high) * 6]
        stop = max(piece.rfind(". "), piece.rfind('." '), piece.rfind("\n"))
        return (piece[:stop + 1] if stop > 20 else piece).strip() or "Nothing."

    def record(self, rng, count=1):
        """A text and up to `count` conversations about it, (context, [turns]): generated, or real; a share of them as a typist has it."""
        context, conversations = self.found(rng, count)
        if not self.typed_share or rng.random() >= self.typed_share:
            return context, conversations
        typed = typist(context, rng)
        return typed(context), [[(role, typed(text, role == "user")) for role, text in turns] for turns in conversations]

    def found(self, rng, count):
        """`record` before a typist has it."""
        found = None
        if rng.random() < self.record_share:
            record = rng.choice(rng.choice(self.records))
            turns = [(t["role"], t["content"]) for t in record["conversations"]]
            context, pairs = excerpt(record["context"], [turns[i:i + 2] for i in range(0, len(turns), 2)], 3 * self.context_length, rng)
            if len(pairs) > (most := min(8, self.max_turns)):
                pairs = pairs[(start := rng.randrange(len(pairs) - most + 1)):start + most]
            found = context, pairs
        elif self.long and rng.random() < self.mined_share:
            found = self.mine(rng)
        if found:
            context, pairs = found
            return context, [[turn for pair in pairs[i::count] for turn in pair] for i in range(min(count, len(pairs)))]
        again = 0.85 if rng.random() < self.rival_share else 0.35
        if count == 1:
            numbers = [1 if rng.random() < 0.1 else rng.randint(3, 10)]
        else:      # many short ones: the first question is the hardest, since no earlier answer spells a word of the text
            numbers = rng.choices((1, 2, 3, 5, 8), (10, 4, 2, 2, 1), k=count)
        numbers = [min(n, self.max_turns) for n in numbers]
        sample = self.source.sample(rng, n_turns=numbers[0], others=numbers[1:], again=again)
        return sample["context"], [[(t["role"], t["content"]) for t in turns] for turns in (sample["conversations"], *sample.get("others", ())) if turns]

    def fitting(self, turns, context=None, context_weight=0.0):
        """`render` of as many of a conversation's first questions as there is room for; one at least."""
        room = self.conversation_length + (self.context_length if context else 0)
        ids, weights = render(self.tokenizer, turns, context, context_weight=context_weight)
        return (ids, weights) if len(ids) <= room or len(turns) <= 2 else self.fitting(turns[:-2], context, context_weight)

    def mine(self, rng):
        """Sentences in a row of a plain text and up to 8 questions that they answer, (text, [(turn, turn)]), or None."""
        for _ in range(20):
            sentences, words = sentences_of(rng.choice(self.long)), rng.randint(10, 110)
            first = last = rng.randrange(len(sentences))
            while last < len(sentences) and (words := words - len(sentences[last].split())) >= 0:
                last += 1
            piece = " ".join(sentences[first:last])
            asked = self.miner.asked(piece)
            if pairs := self.miner.sure(asked):
                pairs = [(casual(question, rng), answer) for question, answer in rng.sample(pairs, min(8, self.max_turns, len(pairs)))]
                if len(pairs) < self.max_turns and rng.random() < 0.3 and (other := self.miner(rng.choice(self.long)[:2000])) and (foreign := rng.choice(other))[0] not in asked:
                    pairs.insert(rng.randrange(len(pairs) + 1), (casual(foreign[0], rng), UNKNOWN))
                return piece, [(("user", question), ("assistant", answer)) for question, answer in pairs]
        return None

    def base(self, rng):
        tok, dice = self.tokenizer, rng.random()
        text_weight = 0.1 if rng.random() < 0.25 else 0.0     # seldom: logits over 8k words are 40 % of a token's cost
        if dice < self.copy_share:                            # repeat or complete the text: copying
            context, turns = (reconstruction if rng.random() < 0.85 else completion)(tok, [self.passage(rng)], rng)
            return None, *render(tok, turns, context, context_weight=text_weight)
        if dice < self.copy_share + self.plain_share:         # plain text
            ids = [tok.end, *tok.encode(self.passage(rng, 60, 200, plain=True)), tok.end]
            return None, ids, [0.0] + [0.1] * (len(ids) - 1)
        context, (turns,) = self.record(rng)
        if rng.random() < 0.06:                               # the same questions without a text
            known = {reply for _, reply in small_talk()}
            turns = [(role, content if role == "user" or content in known else NO_TEXT) for role, content in turns[:4]]
            return None, *render(tok, turns)
        return None, *self.fitting(turns, context, text_weight)

    def pretrain(self, rng):
        tok = self.tokenizer
        if rng.random() < self.question_share:
            return self.finetune(rng)
        size = lambda text: len(tok.encode(text)) + len(tok.close) + len(tok.roles["user"]) + len(tok.roles["assistant"]) + 3
        texts = [self.passage(rng)]
        used, room = size(texts[0]), min(self.context_length, self.conversation_length)
        while rng.random() < self.packing and used + size(more := self.passage(rng)) <= room:
            texts.append(more)
            used += size(more)
        context, turns = (reconstruction if rng.random() < 0.5 else completion)(tok, texts, rng)
        return context, *render(tok, turns)

    gist = pretrain

    def finetune(self, rng):
        context, conversations = self.record(rng, self.conversations)
        rows = [self.fitting(turns) for turns in conversations]
        if rng.random() < self.recall_share:      # its many tokens count less, or the answers would be drowned
            ids, weights = render(self.tokenizer, [("user", [self.tokenizer.recon]), ("assistant", context)])
            rows.insert(1, (ids, [0.3 * w for w in weights]))
        ids, weights = rows[0]
        for more, counted in rows[1:]:
            if len(ids) + 1 + len(more) <= self.conversation_length:
                ids, weights = [*ids, self.tokenizer.end, *more], [*weights, 0.0, *counted]
        return self.tokenizer.encode(context), ids, weights


def pad(rows, value, multiple=8):
    """Lists of different lengths -> (B, T) tensor, padded on the right to a multiple, and its mask."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids, mask


def collate(examples, tokenizer, multiple=8, quarters=False):
    """Examples -> batch, the table at the top of this file; lengths are multiples of `multiple`.

    quarters: as many positions are counted as make a quarter, two, three or all of them, those without weight among them; then batches
    have few different shapes, as train.Graphs wants.
    """
    contexts, rows, weights = zip(*examples)
    batch = {}
    batch["input_ids"], mask = pad(rows, tokenizer.end, multiple)
    apart = (batch["input_ids"] == tokenizer.end) & mask      # <|endoftext|> between two conversations belongs to neither
    apart[:, 0] = False
    batch["attention_mask"] = (1 + apart.cumsum(1)) * (mask & ~apart)
    batch["weights"] = pad(weights, 0.0, multiple)[0].float()
    flat = batch["weights"][:, 1:].flatten()
    batch["counted"] = flat.nonzero()[:, 0]
    if quarters:
        quarter = -(-len(flat) // 4)
        batch["counted"] = torch.cat((batch["counted"], (flat == 0).nonzero()[:-len(batch["counted"]) % quarter, 0]))
    if contexts[0] is not None:
        batch["context_ids"], batch["context_mask"] = pad(contexts, tokenizer.end, multiple)
    return batch


def batches(examples, batch_size, start=0, rank=0, world=1, pool=None, worker=0, workers=1, multiple=8, quarters=False):
    """Endless batches from number `start` on; of each global batch this rank takes its part.

    Examples are made in pools of `pool` batches (default: about 4,096 examples, 128 batches at most). Inside one they are sorted by
    the length of the context, cut into sqrt(pool) parts, and each part is sorted by the length of the conversation, so that little of
    a batch is padding in either. Of several workers each makes every workers-th pool, and `start` counts its own batches. An
    example is told how many come before it in time, which is not its number where workers are at different pools at once.
    """
    size = batch_size * world
    number, pool = start, pool or min(128, max(8, 4096 // size))
    while True:
        done = number % pool
        mine, first = number // pool * pool, (number // pool * workers + worker) * pool
        rng = random.Random(first)
        made = sorted((examples(first * size + i, (mine * size + i) * workers) for i in range(pool * size)), key=lambda e: len(e[0] or ()))
        part = max(1, math.isqrt(pool)) * size if made[0][0] is not None else len(made)
        made = [e for i in range(0, len(made), part) for e in sorted(made[i:i + part], key=lambda e: len(e[1]))]
        groups = [made[i:i + size] for i in range(0, len(made), size)]
        rng.shuffle(groups)
        for group in groups[done:]:
            yield collate(group[rank::world], examples.tokenizer, multiple, quarters)
            number += 1


# ---------------------------------------------------------------------------- python data.py
def show(tokenizer, context, ids, weights):
    """Print one example: the context grey, tokens that carry loss green, one bar between tokens."""
    if context:
        print("\033[90m" + "|".join(map(tokenizer.piece, context)) + "\033[0m")
    print("|".join(f"\033[{92 if w >= 1 else 33}m{tokenizer.piece(i)}\033[0m" if w else tokenizer.piece(i)
                   for i, w in zip(ids, weights)))


def main(argv=None):
    parser = Parser(description="Show examples of every task, or write a held-out evaluation set.")
    parser.add_argument("--model", default=str(ASSETS.parent / "checkpoints/tiny"), help="folder with the tokenizer")
    parser.add_argument("--count", type=positive(int), default=3, help="examples of each task, or texts to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="FILE", help="write generated texts with questions as JSON lines")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="of the texts to write")
    parser.add_argument("--facts", type=positive(int), help="facts in each text to write (default: 1 to 8)")
    parser.add_argument("--turns", type=positive(int), help="questions on each text to write (default: 1 to 8)")
    parser.add_argument("--text", help="folder of .txt or .txt.xz files to mix in, or one file")
    parser.add_argument("--qa", nargs="*", default=[], help="JSON-lines files of conversations to mix in")
    parser.add_argument("--strict", action="store_true", help="stop at a broken line of a QA file")
    args = parser.parse_args(argv)
    if args.write:
        source = Source(args.split)
        rows = [source.sample(random.Random(args.seed * 7919 + i), args.facts, args.turns) for i in range(args.count)]
        write_file(args.write, lambda p: p.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"))
        print(f"{len(rows)} texts, {sum(len(r['meta']['turns']) for r in rows)} questions written to {args.write}")
        return
    tokenizer = Tokenizer.load(args.model)
    texts = read_texts(args.text) if args.text else ()
    records = [read_conversations(path, args.strict) for path in args.qa]
    rng = random.Random(args.seed)
    for name in ("reconstruction", "completion", "several texts in one example", "multi-turn questions", "one question", "questions on a scene",
                 "language modelling, the text in the prompt"):
        print(f"\n=== {name}")
        examples = Examples("base" if "prompt" in name else "finetune", tokenizer, texts=texts, records=records, copy_share=0.0, scene_share=float("scene" in name),
                            record_share=0.0 if "scene" in name else 0.5, typed_share=0.3, max_turns=1 if name == "one question" else 4)
        for i in range(args.count):
            if "question" in name:
                context, (turns,) = examples.record(rng)
                show(tokenizer, tokenizer.encode(context), *render(tokenizer, turns))
            elif "prompt" in name:
                show(tokenizer, *examples(args.seed + i))
            else:
                task = completion if name == "completion" else reconstruction
                context, turns = task(tokenizer, [examples.passage(rng) for _ in range(3 if "several" in name else 1)], rng)
                show(tokenizer, context, *render(tokenizer, turns))
            print()


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message):
        raise UserError(f"{message}; --help lists what there is")


def positive(kind, zero=False):
    """An argparse type: a finite number of this kind above 0, or at least 0."""
    def parse(text):
        value = kind(text)
        if not (0 <= value if zero else 0 < value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if zero else 'above'} 0")
        return value
    parse.__name__ = kind.__name__
    return parse


def share(text):
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share, 0 to 1")
    return value


def run(main):
    """Run a command: what the user can mend becomes one line on standard error and exit status 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:      # the reader of our pipe has gone
        os._exit(0)
    except (UserError, OSError) as error:      # OSError: a full disk under a log file, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
