"""The tiny zoo's tokenizers and text encoders.

Both encoders learn the content of the captioned picture: from the pooled CLIP vector and from every T5 state, small
heads must predict the form and the first and second colour. So each token knows which colour is the shape's and which
is the background's, or with which one the stripes start. TinyFlux gives text tokens no positions, so it could not find
this out itself.
"""

import json
import math
import random
from collections import Counter

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from tinyflux.model.tiny import patterns, shapes
from tinyflux.model.tiny.descent import Descent
from tinyflux.model.tiny.judge import Prompt, prompts
from tinyflux.model.tiny.pictures import PHOTOGRAPHS

VOCABULARY = 880
T5_LENGTH = 32
FORMS = (*shapes.SHAPES, *patterns.KINDS)
TENSORS = {"truncation": True, "return_tensors": "pt"}
WORDS = """
a an the and of in on at with without under over behind beside between near from to by for is are into through against
one two three four five many few some several no not very background foreground left right top bottom middle centre
photo photograph picture portrait painting drawing sketch illustration closeup view scene landscape still life image
texture pattern style shot detail high low quality black and white colour colourful monochrome vintage modern old new
red green blue yellow purple orange pink brown grey gray gold golden silver dark light bright pale deep soft sharp
circle square triangle star ring line dot stripe cross heart shape round flat long short tall wide narrow
stripes vertical horizontal checkerboard
small big large little tiny huge great empty full open closed wet dry cold warm hot clean dirty broken young beautiful
man woman person people girl boy child children baby face eye eyes hair hand head body smile smiling astronaut
cat dog horse bird fish cow sheep bear elephant tiger lion rabbit mouse insect butterfly bee fur feather tail paw
tree trees forest grass flower flowers leaf leaves plant garden field hill mountain mountains river lake sea ocean
beach sand stone stones gravel rock rocks snow ice rain cloud clouds sky sun moon sunset sunrise night day morning
star stars galaxy space planet earth fire smoke water wave waves wood metal glass paper cloth brick wall
house building city street road bridge tower church castle window door roof room kitchen table chair bed floor lamp
car truck bus train boat ship bicycle motorcycle plane rocket wheel engine launch pad suit uniform flag
cup plate spoon bowl bottle coffee tea bread cake fruit apple banana orange lemon food book clock coin coins camera
tripod phone computer screen hat shirt dress shoe bag box ball toy guitar cell cells tissue retina medical
standing sitting walking running flying looking holding wearing playing sleeping eating riding reading
""".split()


def _corpus() -> list[str]:
    return [*(prompt.text for prompt in prompts()), *PHOTOGRAPHS.values(), *WORDS * 20]


def train_t5_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-style unigram tokenizer: whole words, pieces of words, and bytes for the rest."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    words = Counter(word for text in _corpus() for word in text.split())
    scores = {"▁" + word: math.log(count / words.total()) for word, count in words.items()}
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY - 256 - len(words), special_tokens=special, unk_token="<unk>", show_progress=False,
        initial_alphabet=[chr(c) for c in range(33, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)  # its seeds are pieces that several words share: no whole words
    pieces = [tuple(piece) for piece in _trained(tokenizer)["vocab"]]
    rarest = min(score for _, score in pieces)
    pieces += [(word, score) for word, score in scores.items() if word not in dict(pieces)]
    pieces += [(f"<0x{byte:02X}>", rarest - 10) for byte in range(256)]
    tokenizer.model = models.Unigram(pieces, unk_id=2, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=T5_LENGTH
    )


def train_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE: lower case, words end in </w>, and all bytes in both forms, so that nothing is unknown."""
    blank = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    base = [*alphabet, *(character + "</w>" for character in alphabet)]
    merges = [tuple(pair) for pair in _trained(tokenizer)["merges"]][: VOCABULARY - len(base) - 2]
    pieces = [*base, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, merges, model_max_length=77)


def _trained(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


def fit_text(t5: T5EncoderModel, t5_tokenizer, clip: CLIPTextModel, clip_tokenizer, steps: int, seed: int = 0) -> None:
    """Train both encoders in place."""
    torch.manual_seed(seed)
    draws = random.Random(seed)
    scenes, colours = list(prompts()), list(shapes.COLOURS)
    labels = torch.tensor([[colours.index(s.first), FORMS.index(s.form), colours.index(s.second)] for s in scenes])
    t5_heads, clip_heads = (_heads(model.config) for model in (t5, clip))
    descent = Descent(nn.ModuleList([t5, clip, t5_heads, clip_heads]), steps, lr=0, adam_lr=3e-3)
    for step in range(steps):
        rows = [draws.randrange(len(scenes)) for _ in range(48)]
        texts = [_phrase(scenes[row], draws) for row in rows]
        texts += [_prose(draws) for _ in range(16)]
        target = labels[rows]
        padding = "longest" if step % 4 else "max_length"  # mostly the former: it is three times as fast
        t5_loss = _t5_loss(t5, t5_heads, t5_tokenizer(texts, padding=padding, **TENSORS), target)
        clip_loss = _clip_loss(clip, clip_heads, clip_tokenizer(texts, padding="longest", **TENSORS), target)
        descent.step(t5_loss + clip_loss)
        if step % 100 == 0 or step == steps - 1:
            print(f"text {step}: t5 {t5_loss.item():.4f} clip {clip_loss.item():.4f}", flush=True)


def _heads(config) -> nn.ModuleDict:
    width = config.hidden_size
    scene = nn.ModuleList(nn.Linear(width, len(known)) for known in (shapes.COLOURS, FORMS, shapes.COLOURS))
    return nn.ModuleDict({"scene": scene, "words": nn.Linear(width, config.vocab_size)})


def _scene_loss(heads: nn.ModuleDict, states: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of first colour, form and second colour alike: painting the scene would all but lose its form.

    states [B, ..., D], target int64 [B, 3].
    """
    losses = []
    for head, wanted in zip(heads["scene"], target.T, strict=True):
        logits = head(states)
        wanted = wanted.view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
        losses.append(F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), label_smoothing=0.1))
    return torch.stack(losses).sum()


def _t5_loss(t5: T5EncoderModel, heads: nn.ModuleDict, tokens, target: Tensor) -> Tensor:
    """Loss: every state predicts the whole scene and its own word."""
    states = t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state  # [B, L, D]
    words = F.cross_entropy(heads["words"](states).flatten(0, 1), tokens.input_ids.flatten())
    return _scene_loss(heads, states[: len(target)], target) + 0.3 * words


def _clip_loss(clip: CLIPTextModel, heads: nn.ModuleDict, tokens, target: Tensor) -> Tensor:
    """Loss: the pooled vector predicts the scene and the set of words in the prompt."""
    pooled = clip(input_ids=tokens.input_ids).pooler_output  # [B, D]
    present = torch.zeros(len(pooled), clip.config.vocab_size).scatter_(1, tokens.input_ids, 1.0)
    return _scene_loss(heads, pooled[: len(target)], target) + F.binary_cross_entropy_with_logits(
        heads["words"](pooled), present
    )


def _phrase(scene: Prompt, draws: random.Random) -> str:
    """The scene in words: mostly as it is captioned, else rephrased."""
    form, first, second = scene.form.removeprefix("a "), scene.first, scene.second
    if scene.form in patterns.KINDS:
        others = [f"{first} and {second} {form}", f"A {form} of {first} and {second}.", f"{form}, {first} and {second}"]
    else:
        others = [
            f"{first} {form} on {second}", f"A {first} {form} over {second}.", f"{first} {form}, {second} background",
            f"a {second} background with a {first} {form}",
        ]  # fmt: skip
    return draws.choice([*[scene.text] * 4, *others])


def _prose(draws: random.Random) -> str:
    if draws.random() < 0.5:
        return draws.choice(list(PHOTOGRAPHS.values()))
    return " ".join(draws.choices(WORDS, k=draws.randrange(12)))
