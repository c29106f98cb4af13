"""Tokenizers: exact round trips, the same bytes from the same text, clear errors."""

import random

import numpy as np
import pytest
import sentencepiece

from magneto_jax.data import documents, sources, tokenizers
from tests import pieces

# Characters that sentencepiece normalises, reserves or drops unless told otherwise.
_HARD = [
  *" \n\t\0\r\x07\x1b\x7f\x85\xa0\u2028\u200b\ufeff\ufffd\u2581\u2585\u2047éß日😀\u0301\U0010ffff",
  *(
    "the",
    "  ",
    "\n\n",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<0x41>",
    "<0x",
    "▁▁",
    "ﬁ",
    "Ⅻ",
    "か\u3099",
  ),
]


@pytest.fixture(scope="module")
def plays():
  return sources.load_documents("embedded")


@pytest.fixture(scope="module")
def trained(plays, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return tokenizers.SentencePieceTokenizer.train(plays[0], 1024, path)


@pytest.fixture(params=["byte", "sentencepiece"])
def lossless(request, trained):
  return {"byte": tokenizers.ByteTokenizer(), "sentencepiece": trained}[request.param]


@pytest.fixture(params=["byte", "sentencepiece", "char"])
def tokenizer(request, trained):
  return {
    "byte": tokenizers.ByteTokenizer(),
    "sentencepiece": trained,
    "char": tokenizers.CharTokenizer.of(["".join(_HARD), "né😀 To be, or not to be"]),
  }[request.param]


def test_round_trip_is_exact_on_every_play(lossless):
  for split in ("train", "validation", "test"):
    for text in sources.embedded(split):
      assert lossless.decode(lossless.encode(text)) == text


def test_round_trip_is_exact_on_any_unicode(lossless):
  """Hard pieces in any order, then characters from all planes."""
  draw = random.Random(0)
  for _ in range(2000):
    text = "".join(draw.choices(_HARD, k=draw.randrange(12)))
    assert lossless.decode(lossless.encode(text)) == text
  for _ in range(300):
    points = (draw.randrange(0x110000) for _ in range(20))
    text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    assert lossless.decode(lossless.encode(text)) == text


def test_encode_gives_int32_ids_of_the_vocabulary_without_specials(tokenizer):
  for text in ("", "To be, or not to be", "".join(_HARD)):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ((ids >= 4) & (ids < tokenizer.vocab_size)).all()


def test_special_ids_are_the_same_for_all(tokenizer):
  ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
  assert ids == (0, 1, 2, 3)


def test_decode_skips_specials(tokenizer):
  ids = tokenizer.encode("né")
  assert tokenizer.decode([1, *ids[:1], 0, 3, *ids[1:], 2, 0]) == "né"
  assert tokenizer.decode(np.array([1, 2, 0])) == ""


def test_cut_bytes_are_replaced(lossless):
  cut = lossless.encode("😀")[:-1]  # no piece of its own, so bytes
  assert set(lossless.decode(cut)) == {"\ufffd"}


@pytest.mark.parametrize("bad", [-1, 1024, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, bad):
  with pytest.raises(ValueError, match=r"ids must lie in \[0, \d+\), got .*" + str(bad)):
    tokenizer.decode([bad])


def test_byte_ids_are_four_plus_the_byte():
  byte = tokenizers.ByteTokenizer()
  assert byte.vocab_size == 260
  assert byte.encode("A\0é").tolist() == [4 + 65, 4, 4 + 0xC3, 4 + 0xA9]


def test_newline_is_a_piece_of_its_own(trained):
  newline = trained.encode("\n")
  assert newline.size == 1
  assert trained.encode("a\n\nb").tolist().count(newline[0]) == 2


def test_training_twice_gives_the_same_bytes(plays, tmp_path, trained):
  paths = [tmp_path / "a.model", tmp_path / "deeper" / "b.model"]
  made = [tokenizers.SentencePieceTokenizer.train(plays[0], 1024, path) for path in paths]
  assert paths[0].read_bytes() == paths[1].read_bytes()
  assert made[0].identity == made[1].identity == trained.identity


def test_loaded_is_the_trained(plays, tmp_path):
  path = tmp_path / "tokenizer.model"
  made = tokenizers.SentencePieceTokenizer.train(plays[0], 512, path)
  loaded = tokenizers.SentencePieceTokenizer.load(path)
  assert loaded.identity == made.identity and loaded.vocab_size == 512
  text = plays[1][0]
  np.testing.assert_array_equal(loaded.encode(text), made.encode(text))


def test_another_text_has_another_identity(plays, tmp_path, trained):
  made = tokenizers.SentencePieceTokenizer.train(plays[1], 1024, tmp_path / "tokenizer.model")
  assert made.identity != trained.identity


def test_bpe_beats_unigram_on_the_held_out_play(plays, trained, tmp_path):
  """The figures of the class docstring."""
  text = plays[1][0]
  assert len(trained.encode(text)) == 45_132
  larger = tokenizers.SentencePieceTokenizer.train(plays[0], 2048, tmp_path / "tokenizer.model")
  assert len(larger.encode(text)) == 39_323


def test_no_training_text_is_lost_to_long_lines():
  """One line of 300 kB, a word of 5,000 letters: sentencepiece would drop both in silence."""
  draw = random.Random(0)
  line = " ".join("".join(draw.choices("abcdé", k=draw.randrange(1, 9))) for _ in range(50_000))
  text = f"{line}\n\n{'x' * 5000}\r\n\u2581a\u2585b\0c"
  sentences = list(tokenizers._sentences([text], 10**6, documents.BadRecords()))
  assert max(len(s.encode()) for s in sentences) <= 4192
  reserved = str.maketrans("", "", "\n\0\u2581\u2585")
  assert "".join(sentences) == text.translate(reserved)
  assert all(s.startswith(" ") for s in sentences[1 : len(line) // 1000])  # cut at spaces


def test_a_long_line_teaches_the_words_in_it(tmp_path):
  made = tokenizers.SentencePieceTokenizer.train(
    ["a zebra crossing " * 1000], 280, tmp_path / "tokenizer.model"
  )
  assert len(made.encode(" zebra")) < 7


@pytest.mark.parametrize("limit", [1, 7, 10, 25, 100])
def test_sampling_takes_at_most_the_limit_evenly(limit):
  """Ten documents of unequal length: up to ten sentences each document gives at most one."""
  texts = ["\n".join(f"{d}-{i}" for i in range(1 + d)) for d in range(10)]
  sentences = list(tokenizers._sentences(texts, limit, documents.BadRecords()))
  assert len(sentences) == len(set(sentences)) == min(limit, 55)
  visited = [int(s.split("-")[0]) for s in sentences]
  assert len(set(visited)) == min(limit, 10) and visited == sorted(visited)


def test_sampling_bounds_what_is_trained_on(plays, tmp_path, trained):
  made = tokenizers.SentencePieceTokenizer.train(
    plays[0], 1024, tmp_path / "tokenizer.model", max_sentences=2000
  )
  assert made.identity != trained.identity
  # A sample of 7 % of the lines costs a few per cent of compression.
  assert len(made.encode(plays[1][0])) < 1.05 * 45_132


@pytest.mark.parametrize(
  ("texts", "vocab_size", "message"),
  [
    (["abc " * 9], 100, "vocab_size=100 is too small .* use >= 265"),
    (["abc " * 9], 5000, "vocab_size=5000 is more than this text has pieces for: use <= 2"),
    (["\n\n"], 300, "the training text is empty"),
    ([], 300, "the training text is empty"),
    (["abc"], 0, "vocab_size=0"),
    (["abc"], -5, "vocab_size=-5"),
  ],
)
def test_training_that_cannot_work_says_which_size_would(tmp_path, texts, vocab_size, message):
  path = tmp_path / "tokenizer.model"
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.SentencePieceTokenizer.train(texts, vocab_size, path)
  assert "\n" not in str(caught.value)
  assert not path.exists()


def test_a_text_that_cannot_be_read_is_not_blamed_on_the_size(tmp_path):
  class Broken(list):
    def __getitem__(self, index):
      raise OSError("disk gone")

  with pytest.raises(OSError, match="^disk gone$"):
    tokenizers.SentencePieceTokenizer.train(Broken("a"), 300, tmp_path / "tokenizer.model")


def test_the_suggested_size_works(tmp_path):
  path = tmp_path / "tokenizer.model"
  assert tokenizers.SentencePieceTokenizer.train(["abc " * 9], 265, path).vocab_size == 265


def test_load_names_a_missing_or_foreign_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer_file: .*none\.model does not exist"):
    tokenizers.SentencePieceTokenizer.load(tmp_path / "none.model")
  for content in (b"", b"not a model", bytes(100)):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model"):
      tokenizers.SentencePieceTokenizer.load(tmp_path / "bad.model")


@pytest.mark.parametrize("options", [{}, {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}])
def test_load_refuses_models_with_other_ids_or_without_bytes(tmp_path, options):
  prefix = tmp_path / "other"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["some words", "more words"]),
    model_prefix=str(prefix),
    model_type="bpe",
    vocab_size=20,
    minloglevel=2,
    **options,
  )
  with pytest.raises(ValueError, match=r"other\.model has the ids .*byte_fallback=true"):
    tokenizers.SentencePieceTokenizer.load(f"{prefix}.model")


# ---------------------------------------------------------------------------------------------
# XLM-R's
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
  return pieces.train(tmp_path_factory.mktemp("xlmr") / "released.spm")


def test_xlmr_ids_are_those_of_fairseqs_dictionary(spm):
  """Which lists its four marks, the model's pieces but for the model's own marks, and the mask."""
  made = tokenizers.XLMRTokenizer.load(spm)
  model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
  own = [model.id_to_piece(i) for i in range(model.get_piece_size())]
  assert own[:3] == ["<unk>", "<s>", "</s>"]
  symbols = ["<s>", "<pad>", "</s>", "<unk>", *own[3:], "<mask>"]
  texts = [*pieces.WORDS, "a cat's ☃ face", "cat </s> <mask>", "", " a  cat "]
  for text, found in zip(texts, made.encode_all(texts), strict=True):
    split = model.encode(text, out_type=str)
    expected = [symbols.index(p) if p in symbols[4:-1] else 3 for p in split]
    assert found.dtype == np.int32 and found.tolist() == expected
    assert made.encode(text).tolist() == expected
  assert (made.bos_id, made.pad_id, made.eos_id, made.unk_id) == (0, 1, 2, 3)
  # BEiT-3's: of 64,000 pieces the mask is 64,001.
  assert symbols.index("<mask>") == made.vocab_size == len(own) + 1
  assert 3 in made.encode("☃") and not {0, 1, 2} & {*made.encode("<s> <pad> </s>").tolist()}


def test_xlmr_gives_texts_back_but_for_what_has_no_piece(spm):
  made = tokenizers.XLMRTokenizer.load(spm)
  for text in pieces.WORDS:
    assert made.decode([made.bos_id, *made.encode(text), made.eos_id, made.pad_id]) == text
  assert made.decode(made.encode("a ☃ cat")).split() == ["a", "cat"]
  for bad in (-1, made.vocab_size):
    with pytest.raises(ValueError, match="ids must lie in"):
      made.decode([bad])


def test_xlmr_is_known_by_its_file_and_no_other_model_is_one(spm, trained, tmp_path):
  made = tokenizers.XLMRTokenizer.load(spm)
  assert made.identity["kind"] == "xlmr" and made.identity["vocab_size"] == made.vocab_size
  assert tokenizers.XLMRTokenizer.load(spm, made.identity).identity == made.identity
  other = pieces.train(tmp_path / "other.spm", ("other words", "and more of them"))
  with pytest.raises(ValueError, match="is not the tokenizer that this run was started with"):
    tokenizers.XLMRTokenizer.load(other, made.identity)
  (tmp_path / "own.model").write_bytes(trained.model)
  with pytest.raises(ValueError, match=r"own.model has the ids .*; one of XLM-R's kind has"):
    tokenizers.XLMRTokenizer.load(tmp_path / "own.model")
  with pytest.raises(ValueError, match=r"released.spm has the ids .*; tokenizer='xlmr' reads"):
    tokenizers.SentencePieceTokenizer.load(spm)
  with pytest.raises(FileNotFoundError, match="none.spm does not exist"):
    tokenizers.XLMRTokenizer.load(tmp_path / "none.spm")


# ---------------------------------------------------------------------------------------------
# Characters
# ---------------------------------------------------------------------------------------------


def test_characters_are_numbered_in_their_order():
  """Whatever the order of the texts; the text comes back exactly."""
  made = tokenizers.CharTokenizer.of(["ba d", "éa😀\n"])
  assert made.characters == "\n abdé😀" and made.vocab_size == 4 + 7
  assert made.encode("a\n").tolist() == [6, 4]
  assert made.identity == tokenizers.CharTokenizer.of(["éa😀\n", "", "bad ad"]).identity
  assert made.identity != tokenizers.CharTokenizer.of(["éa😀\n", "bad x"]).identity
  draw = random.Random(0)
  for _ in range(100):
    text = "".join(draw.choices(made.characters, k=draw.randrange(12)))
    assert made.decode(made.encode(text)) == text
  for ids, text in zip(made.encode_all(["ab", ""]), ("ab", ""), strict=True):
    np.testing.assert_array_equal(ids, made.encode(text))


def test_other_characters_are_unknown():
  made = tokenizers.CharTokenizer.of(["abc"])
  ids = made.encode("axb")
  assert ids.tolist() == [4, tokenizers.UNK_ID, 5] and made.decode(ids) == "ab"


def test_characters_are_loaded_as_they_were_written(tmp_path):
  made = tokenizers.CharTokenizer.of(["né 😀\0\u2581"])
  (path := tmp_path / "characters.json").write_bytes(made.content)
  loaded = tokenizers.CharTokenizer.load(path, made.identity)
  assert loaded.characters == made.characters and loaded.identity == made.identity
  other = tokenizers.CharTokenizer.of(["abc"]).identity
  with pytest.raises(ValueError, match="characters.json is not the tokenizer that this run was st"):
    tokenizers.CharTokenizer.load(path, other)


BAD_CHARACTERS = ("", "abc", "[]", "{}", *(f'{{"characters": {v}}}' for v in (3, '""', '"ba"')))


def test_a_file_of_halves_of_characters_is_refused(tmp_path):
  """JSON can hold them, UTF-8 cannot: no answer with one could be written."""
  (path := tmp_path / "characters.json").write_text('{"characters": "a\\ud800"}')
  with pytest.raises(ValueError, match="characters.json: .*are not valid text") as error:
    tokenizers.CharTokenizer.load(path)
  str(error.value).encode()


@pytest.mark.parametrize("content", (*BAD_CHARACTERS, '{"characters": "aa"}'))
def test_a_file_without_characters_is_named(tmp_path, content):
  (path := tmp_path / "characters.json").write_text(content)
  with pytest.raises(ValueError, match=r"characters\.json") as error:
    tokenizers.CharTokenizer.load(path)
  assert "\n" not in str(error.value)
  with pytest.raises(FileNotFoundError, match="tokenizer_file: .*none.json does not exist"):
    tokenizers.CharTokenizer.load(tmp_path / "none.json")
  with pytest.raises(ValueError, match="the training text is empty"):
    tokenizers.CharTokenizer.of(["", ""])
