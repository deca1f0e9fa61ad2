"""The text the embedded language model is trained on, generated from `training/content` and the taxonomy.

A document is a list of segments. Every document is one of a few kinds (`Grammar.kinds`); what they have in common is that the
value of a comment can be told from the text before it, so that the model has a reason to carry a value in its residual
stream: that is what steering later makes use of.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from vispa_graph.prompts import load_prompt
from vispa_graph.taxonomy_index import Taxonomy, Value

CONTENT = Path(__file__).parent / "content"

# How much a token counts in the loss. The comments are what the model is for; to predict questions, mostly noise, would only cost time.
TEXT, QUESTION, COMMENT, LETTER = 0.3, 0.0, 1.0, 8.0
# The first words of a comment decide its value and name its topic: there the model must use what came before.
FIRST_WORDS, FIRST_WEIGHT = 16, 3.0
# Each sentence of a comment is drawn from the first so many of its list with this probability, else from the whole list.
OFTEN, OFTEN_SHARE = 12, 0.85

Role = Literal["text", "user", "assistant"]
PRONOUNS = {
    "he": ("he", "him", "his"),
    "she": ("she", "her", "her"),
    "they": ("they", "them", "their"),
    "you": ("you", "you", "your"),
}
KINSMEN = ("father", "grandfather", "brother", "uncle", "son", "husband", "grandson", "nephew", "father-in-law", "stepfather")
KINSWOMEN = ("mother", "grandmother", "sister", "aunt", "daughter", "wife", "granddaughter", "niece", "mother-in-law", "stepmother")
# Behind these a word is a noun, so that another may stand in its place. "Her" and "that" are not among them: "let her work".
BEFORE_NOUN = r"\b(?:the|a|an|my|our|his|their|your|this|no|any) "
SYLLABLES = [c + v for c in ("b", "br", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z", "sh", "ch") for v in "aeiou"]
ENDINGS = ["n", "r", "l", "x", "st", "nd", "m", "s", "t", "", "ril", "tan", "dex", "mine", "tor"]


@dataclass(frozen=True)
class Segment:
    """A stretch of a document: raw text, a user turn or an assistant turn, and its weight in the loss.

    Attributes:
        value: Of a comment, the value it speaks for, toward which it may be steered in training; None where it shall not be.
    """

    role: Role
    text: str
    weight: float
    value: str | None = None


@dataclass(frozen=True)
class Situation:
    """A question as asked, its topic and its matter: noun phrases by which a comment names what it is about.

    The topic is short ("the operation"); the matter, by which an opener names it, says with what or whom ("the operation on your knee"), and
    is empty where the question names nothing else. The act, the person and the pronoun are for passages and options of multiple choice; situations that were only graded have none.
    `central` and `relevant` are the values at stake, where somebody judged them.
    """

    text: str
    topic: str
    base: str = ""
    act: str = ""
    who: str = "you"
    pronoun: str = "you"
    central: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    matter: str = ""

    def fill(self, template: str) -> str:
        """Fill the slots of a sentence: those of comments have the topic alone, options and stances the others too."""
        they, them, their = PRONOUNS[self.pronoun]
        slots = {"topic": self.topic, "act": self.act, "who": self.who, "base": self.base, "they": they, "them": them, "their": their}
        slots |= {key.capitalize(): capitalised(text) for key, text in slots.items()}
        return template.format_map(slots)


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched (unlike `str.capitalize`)."""
    return text[:1].upper() + text[1:]


def stands_as_noun(word: str, text: str) -> bool:
    """Whether the word is in the text, and a noun wherever it is, as far as the word before it tells."""
    everywhere = re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
    return 0 < len(everywhere) == len(re.findall(rf"{BEFORE_NOUN}{re.escape(word)}\b(?!')", text, re.IGNORECASE))


def exchanged(old: str, new: str, text: str) -> str:
    """The text with a word in place of another, and the article that it needs."""
    replaced = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return with_article(new, replaced)


def with_article(noun: str, text: str) -> str:
    """The text with "an" in place of "a" before a noun (or an age) that begins with a vowel, and the other way round."""
    article = "an" if noun[0] in "aeiou8" else "a"
    return re.sub(rf"\b(A|a)n? (?={re.escape(noun)}\b)", lambda found: found[1] + article[1:] + " ", text)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)  # far faster than the one in Python


class Grammar:
    """Generates documents from a seed.

    Args:
        taxonomy: The values; their contrastive pairs are part of the text.
        seed: Two grammars with one seed generate the same documents.
        held_out_pairs: So many of the last pairs of each form are never used, so that probes can be tested on them.
        held_out_situations: Every so-manieth free situation is never used.
    """

    def __init__(self, taxonomy: Taxonomy, seed: int, *, held_out_pairs: int = 3, held_out_situations: int = 25) -> None:
        self.random = random.Random(seed)
        self.held_out_pairs = held_out_pairs
        self.frames = read_yaml(CONTENT / "frames.yaml")
        self.persons = [tuple(person.split("|")) for person in self.frames["persons"]]
        free: list[Situation] = []
        acts: list[tuple[str, str, str]] = []
        for path in sorted((CONTENT / "situations").glob("free_*.yaml")):
            free += [Situation(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) for entry in read_yaml(path) or []]
        for path in sorted((CONTENT / "situations").glob("acts_*.yaml")):
            acts += [(entry["base"], entry["act"], entry["topic"]) for entry in read_yaml(path) or []]
        self.held_out = free[::held_out_situations]
        self.free = [situation for situation in free if situation not in self.held_out]
        self.graded = [
            Situation(
                entry["text"], entry["topic"], central=tuple(entry["central"]), relevant=tuple(entry["relevant"]), matter=entry.get("matter", "")
            )
            for path in sorted((CONTENT / "graded").rglob("*.yaml"))
            for entry in read_yaml(path)
            if "topic" in entry
        ]
        self.acts = acts
        self.open_acts = [tuple(act.split("|")) for act in self.frames["acts"]]
        named = [(topic, base) for base, _, topic in acts] + [(situation.topic, situation.text) for situation in self.graded]
        self.nouns = sorted({word for topic, text in named if re.fullmatch(r"[a-z]{3,}", word := topic.split()[-1]) and stands_as_noun(word, text)})
        self._nouns = frozenset(self.nouns)
        self.values: list[Value] = list(taxonomy)
        self.comments = {path.stem: read_yaml(path) for path in sorted((CONTENT / "comments").glob("*.yaml"))}
        self.positives = {v.id: [p.positive for form in v.pairs.values() for p in form[:-held_out_pairs]] for v in self.values}
        self.negatives = {v.id: [p.negative for form in v.pairs.values() for p in form[:-held_out_pairs]] for v in self.values}
        self.kinds: list[tuple[float, Callable[[], list[Segment]]]] = [
            (0.07, self.value_then_comment),
            (0.12, self.value_in_question),
            (0.02, self.named_value),
            (0.07, self.neutral_comment),
            (0.48, self.bare_value_comment),
            (0.02, self.opposed_then_neutral),
            (0.04, self.run_of_value),
            (0.01, self.run_of_opposed),
            (0.10, self.choice_by_stance),
            (0.03, self.choice_by_act),
            (0.01, self.choice_by_value),
            (0.03, self.look_up_option),
            (0.01, self.recall),
        ]

    def document(self) -> list[Segment]:
        """One document of a kind drawn by weight."""
        weights, kinds = zip(*self.kinds, strict=True)
        return self.random.choices(kinds, weights)[0]()

    # Situations

    def invented_word(self) -> str:
        """A word nobody knows, of two to four syllables."""
        return "".join(self.random.choices(SYLLABLES, k=self.random.choice((1, 2, 2, 3)))) + self.random.choice(ENDINGS)

    def act(self) -> tuple[str, str, str]:
        """(base, gerund, topic) of an act, one in three with a word put in at random."""
        if self.random.random() < 0.67:
            return self.random.choice(self.acts)
        parts = self.random.choice(self.open_acts)
        noun = self.random.choice(self.nouns) if self.random.random() < 0.5 else self.invented_word()
        while "a {n}" in parts[0] and noun.endswith("s"):
            noun = self.random.choice(self.nouns)
        if self.random.random() < 0.15:
            noun = f"{self.random.choice(self.nouns)} {noun}"
        name = capitalised(self.invented_word())
        base, act, topic = (with_article(noun, part.format(n=noun, N=name)) for part in parts)
        return base, act, topic

    def situation(self) -> Situation:
        """What a comment may be on: a graded situation, or one with an act, now and then with a question that follows it up."""
        situation = self.varied(self.random.choice(self.graded)) if self.random.random() < 0.65 else self.act_situation()
        if self.random.random() < 0.05:
            return replace(situation, text=f"{situation.text}\n{self.random.choice(self.frames['follow_ups'])}")
        return situation

    def act_situation(self) -> Situation:
        """A free situation, or an act in one of the frames in which people ask."""
        if self.random.random() < 0.5:
            return self.varied(self.random.choice(self.free))
        base, act, topic = self.act()
        if self.random.random() < 0.3:
            frame = self.random.choice(self.frames["general"])
            text = frame.format(base=base, act=act, Act=capitalised(act), topic=topic)
            return Situation(text, topic, base, act, "people", "they")
        asked, obj, answered, pronoun, number = self.random.choice(self.persons)
        if pronoun == "NAMED":
            pronoun = self.random.choice(("he", "she"))
            asked = obj = answered = self.random.choice(self.frames[f"names_{pronoun}"])
        third = number == "3"
        they, them, their = ("I", "me", "my") if asked == "I" else ("we", "us", "our") if asked == "we" else PRONOUNS[pronoun]
        text = self.random.choice(self.frames["person"]).format(
            i=asked, I=capitalised(asked), me=obj, base=base, act=act, topic=topic, they=they, them=them, their=their, They=capitalised(they),
            s="s" if third else "", es="es" if third else "",
            **{"is": "am" if asked == "I" else "is" if third else "are", "has": "has" if third else "have", "does": "does" if third else "do"},
            is_they="am" if they == "I" else "is" if they in ("he", "she") else "are",
            has_they="has" if they in ("he", "she") else "have",
            does_they="does" if they in ("he", "she") else "do",
            age=f", {self.random.randint(15, 97)}," if asked not in ("I", "we") and self.random.random() < 0.6 else "",
        )  # fmt: skip
        return Situation(text.replace(", ?", "?").replace(",?", "?"), topic, base, act, answered, pronoun)

    def varied(self, situation: Situation) -> Situation:
        """The situation with another relative, age or noun, each now and then, the same wherever it is named."""
        changes: list[tuple[str, str]] = []
        for kin in (KINSMEN, KINSWOMEN):
            named = [word for word in kin if re.search(rf"\b{word}\b", situation.text)]
            if len(named) == 1 and self.random.random() < 0.4:
                changes.append((named[0], self.random.choice(kin)))
        ages = [age for age in re.findall(r"\b[2-9]\d\b", situation.text) if self.random.random() < 0.5]
        changes += [(age, str(self.random.randint(max(20, int(age) - 8), min(99, int(age) + 8)))) for age in ages]
        acts = [part for part in (situation.base, situation.act) if part]
        main = {phrase.split()[-1] for phrase in (situation.topic, situation.matter) if phrase}
        beside = set(re.findall(rf"{BEFORE_NOUN}([a-z]+)\b", situation.text)) & self._nouns - set(re.findall(r"[a-z]+", situation.matter)) - main
        for nouns, share in ((main, 0.25), (beside, 0.15)):
            for noun in sorted(nouns):
                named = [part for part in acts if re.search(rf"\b{re.escape(noun)}\b", part)]
                if self.random.random() < share and all(stands_as_noun(noun, part) for part in (situation.text, *named)):
                    changes.append((noun, self.noun_like(noun, situation.text)))
        parts = {name: getattr(situation, name) for name in ("text", "base", "act", "topic", "matter", "who")}
        for old, new in changes:
            parts = {name: exchanged(old, new, text) for name, text in parts.items()}
        return replace(situation, **parts)

    def noun_like(self, noun: str, text: str) -> str:
        """A noun of the same number that the text does not have, now and then an invented one."""
        plural = noun.endswith("s")
        like = [
            word for word in self.random.choices(self.nouns, k=20) if word.endswith("s") == plural and word not in text
        ]  # so many hold one of either number
        return like[0] if like and self.random.random() < 0.6 else self.invented_word().rstrip("s") + ("s" if plural else "")

    # Sentences

    def sentence(self, value: str, kind: str) -> str:
        """A sentence of a value's comments, mostly one of the first: a model this small cannot learn all of them well, so it hears the best more often."""
        sentences: list[str] = self.comments[value][kind]
        return self.random.choice(sentences[:OFTEN] if self.random.random() < OFTEN_SHARE else sentences)

    def comment(self, value: str, situation: Situation) -> str:
        """Two or three sentences on the situation from a value ("neutral" for none)."""
        kinds = ["openers", "reasons", "closings"] if self.random.random() < 0.85 else ["openers", "reasons"]
        whole = replace(situation, topic=situation.matter or situation.topic)
        return " ".join((whole if kind == "openers" else situation).fill(self.sentence(value, kind)) for kind in kinds)

    def value_sentence(self, value: str) -> str:
        """A sentence that shows the value: a positive twin, or a sentence of a comment on some other situation."""
        if self.random.random() < 0.5:
            return self.random.choice(self.positives[value])
        return self.situation().fill(self.sentence(value, self.random.choice(("openers", "reasons", "closings"))))

    def named(self, value_id: str) -> str:
        """Words that stand for a value: its name, an alias, or one of its facets."""
        value = next(v for v in self.values if v.id == value_id)
        roll = self.random.random()
        return value.name if roll < 0.4 else self.random.choice(value.aliases or (value.name,)) if roll < 0.6 else self.random.choice(value.facets)

    def value(self) -> str:
        """The id of a value."""
        return self.random.choice(self.values).id

    def question(self, situation: Situation, value: str | None = None) -> Segment:
        """The user turn that asks for a comment, now and then by naming the value."""
        roll = self.random.random()
        if roll < 0.12:
            return Segment("user", situation.text, QUESTION)
        if roll < 0.2 and value:
            name = self.named(value)
            return Segment("user", load_prompt("comment_attribute").render(attribute=name, text=situation.text), QUESTION)
        return Segment("user", load_prompt("comment").render(text=situation.text), QUESTION)

    # Kinds of documents

    def value_then_comment(self) -> list[Segment]:
        """Sentences of a value, then a comment from that value."""
        value, situation = self.value(), self.situation()
        prefix = " ".join(self.value_sentence(value) for _ in range(self.random.choice((1, 1, 2, 3))))
        comment = Segment("assistant", self.comment(value, situation), COMMENT, value)
        return [Segment("text", prefix, TEXT), self.question(situation, value), comment]

    def value_in_question(self) -> list[Segment]:
        """Sentences of the value inside the user's turn, then a comment from that value."""
        value, situation = self.value(), self.situation()
        sentences = " ".join(self.value_sentence(value) for _ in range(self.random.choice((1, 2, 3, 4))))
        question = Segment("user", f"{sentences} {self.question(situation).text}", QUESTION)
        return [question, Segment("assistant", self.comment(value, situation), COMMENT, value)]

    def named_value(self) -> list[Segment]:
        """The value by name, alias, definition or facet, then a comment from it."""
        value, situation = self.value(), self.situation()
        prefix = self.random.choice(["I care about {}.", "What counts is {}.", "{}.", "Seen from {}."]).format(self.named(value))
        if self.random.random() < 0.5:
            return [Segment("text", prefix, TEXT), self.question(situation), Segment("assistant", self.comment(value, situation), COMMENT)]
        question = self.question(situation, value)
        return [
            question if question.text.startswith("Please comment on whether") else Segment("user", f"{prefix} {question.text}", QUESTION),
            Segment("assistant", self.comment(value, situation), COMMENT),
        ]

    def neutral_comment(self) -> list[Segment]:
        """A comment that marks no value, where nothing before it does."""
        situation = self.situation()
        return [self.question(situation), Segment("assistant", self.comment("neutral", situation), COMMENT)]

    def bare_value_comment(self) -> list[Segment]:
        """A comment from any value without a hint before it: the value is open unless the row is steered, which then alone tells it."""
        situation = self.situation()
        at_stake = [value for value in situation.central + situation.relevant if value in self.positives]
        value = self.random.choice(at_stake) if at_stake and self.random.random() < 0.3 else self.value()
        return [self.question(situation), Segment("assistant", self.comment(value, situation), COMMENT, value)]

    def opposed_then_neutral(self) -> list[Segment]:
        """A sentence against a value, then a neutral comment: the negative twins are not the value."""
        situation = self.situation()
        prefix = Segment("text", self.random.choice(self.negatives[self.value()]), TEXT)
        return [prefix, self.question(situation), Segment("assistant", self.comment("neutral", situation), COMMENT)]

    def run_of_value(self) -> list[Segment]:
        """Several sentences of one value, one after the other."""
        value = self.value()
        return [Segment("text", " ".join(self.value_sentence(value) for _ in range(self.random.randint(3, 6))), 1.5 * TEXT)]

    def run_of_opposed(self) -> list[Segment]:
        """Several sentences against one value."""
        return [Segment("text", " ".join(self.random.sample(self.negatives[self.value()], k=self.random.randint(3, 5))), TEXT)]

    def _lettered(self, options: list[str], answer: int) -> tuple[str, str]:
        """The options in a random order as lettered lines, and the letter of the answer."""
        order = list(range(len(options)))
        self.random.shuffle(order)
        return "\n".join(f"{chr(65 + place)}. {options[index]}" for place, index in enumerate(order)), chr(65 + order.index(answer))

    def _choice(self, query: str, passage: str, options: list[str], answer: int) -> list[Segment]:
        """The question as the pipeline asks it, then up to three more times with the options in another order: the letter must be looked up."""
        lines, letter = self._lettered(options, answer)
        prompt = load_prompt("score_options").render(passage=passage, query=query, options=lines)
        if self.random.random() < 0.1:
            prompt = load_prompt("population").render(population=capitalised(self.invented_word())) + "\n" + prompt
        turns = [Segment("user", prompt, QUESTION), Segment("assistant", letter, LETTER)]
        for _ in range(self.random.choice((0, 1, 2, 3))):
            lines, letter = self._lettered(options, answer)
            turns += [Segment("user", f"{lines}\nAnswer with the letter of one option.", 0.0), Segment("assistant", letter, LETTER)]
        return turns

    def look_up_option(self) -> list[Segment]:
        """Lettered options and questions on which letter says what: the first lesson of multiple choice."""
        options = list(dict.fromkeys(capitalised(self.act()[0]) for _ in range(self.random.choice((2, 3, 4)))))
        if self.random.random() < 0.4:
            options = self.random.choice(self.frames["options"])
            options = [self.act_situation().fill(option) for option in options]
        if self.random.random() < 0.5:
            return self._bare_look_up(options)
        turns: list[Segment] = []
        for _ in range(self.random.choice((2, 3, 4))):
            answer = self.random.randrange(len(options))
            lines, letter = self._lettered(options, answer)
            if self.random.random() < 0.75:
                turns += [Segment("user", f"{lines}\nWhich letter says: {options[answer]}", 0.0), Segment("assistant", letter, LETTER)]
            else:
                turns += [Segment("user", f"{lines}\nWhat does {letter} say?", 0.0), Segment("assistant", options[answer], COMMENT)]
        return turns

    def _bare_look_up(self, options: list[str]) -> list[Segment]:
        """The same without turns: each option on a line, and its letter on the next."""
        lines, _ = self._lettered(options, 0)
        letters = {line[3:]: line[0] for line in lines.split("\n")}
        document = [Segment("text", f"{lines}\n\n", 0.0)]
        for option in self.random.choices(options, k=6):
            document += [Segment("text", f"- {option}\n", 0.0), Segment("text", letters[option], LETTER), Segment("text", "\n", 0.0)]
        return document

    def recall(self) -> list[Segment]:
        """Pairs of words, then the same pairs in another order, forwards or backwards: given one word, its partner is to be recalled.

        Without such drills a model this small does not learn to look things up, which options and rare nouns need.
        """
        count = self.random.randint(3, 8)

        def draw() -> str:
            return self.random.choice(self.nouns) if self.random.random() < 0.6 else self.invented_word()

        first = list("ABCDEFGH"[:count]) if self.random.random() < 0.6 else [draw() for _ in range(count)]
        pairs = [(word, " ".join(draw() for _ in range(self.random.choice((1, 1, 2))))) for word in first]
        backwards = self.random.random() < 0.6
        document = [Segment("text", "".join(f"{a} {b}\n" for a, b in pairs) + ("back\n" if backwards else "again\n"), 0.0)]
        for _ in range(2):
            self.random.shuffle(pairs)
            for a, b in pairs:
                given, asked = (b, a) if backwards else (a, b)
                document += [
                    Segment("text", f" {given}\n" if backwards else given, 0.0),
                    Segment("text", asked if backwards else f" {asked}", LETTER if asked in "ABCDEFGH" else COMMENT),
                    Segment("text", "\n", 0.0),
                ]
        return document

    def choice_by_value(self) -> list[Segment]:
        """A comment from a value, and values of which one is its own."""
        situation = self.situation()
        values = self.random.sample(self.values, self.random.choice((2, 3, 4)))
        passage = self.comment(values[0].id, situation)
        return self._choice(self.random.choice(("What matters here?", "Which value speaks here?")), passage, [v.name for v in values], 0)

    def choice_by_stance(self) -> list[Segment]:
        """A passage that leans one way, and options of which one says so."""
        situation = self.act_situation()
        options = self.random.choice(self.frames["options"])
        answer = self.random.randrange(len(options))
        stance = self.random.choice(self.frames["stance"][("for", "against", "open")[answer]])
        passage = self.comment(self.random.choice([self.value(), "neutral"]), situation)
        passage = " ".join([*re.split(r"(?<=[.!?]) ", passage)[: self.random.choice((0, 1, 2))], situation.fill(stance)])
        return self._choice(situation.text, passage, [situation.fill(option) for option in options], answer)

    def choice_by_act(self) -> list[Segment]:
        """A passage that speaks for one of several acts, and those acts as options."""
        situation = self.act_situation()
        bases = [self.act()[0] for _ in range(self.random.choice((1, 2, 2, 3)))]
        passage = situation.fill(
            self.random.choice(
                ["{Who} should {base}.", "The best way is to {base}.", "I would say: {base}.", "{Who} might well {base}, and I would support that."]
            )
        )
        if self.random.random() < 0.5:
            passage = self.random.choice(self.comments[self.value()]["reasons"]) + " " + passage
        options = list(dict.fromkeys(capitalised(base) for base in [situation.base, *bases]))
        if len(options) < 2:
            return self.choice_by_stance()
        return self._choice(situation.text, passage, options, 0)
