"""What pocket knows: every question with its wordings and answers, in English and in Chinese.

The text is in `text/*.yaml`, written by the project. An `Intent` is one question in one language: many
wordings, one or more equally good answers, and the substrings that show that an answer follows it.
"""

import dataclasses
import random
import zlib
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

TEXT = Path(__file__).parent / "text"

Language = Literal["en", "zh"]
Topic = Literal["reprise", "small talk", "knowledge", "tables", "sums", "numbers", "unknown"]

LANGUAGES: tuple[Language, ...] = ("en", "zh")

# One wording in this many is kept out of the training text, to measure wordings that were never seen.
HELD_OUT_SHARE = 8


def bare(wording: str) -> str:
    """A wording without case, spaces and the marks at its ends."""
    return wording.casefold().replace(" ", "").strip("?.!？。！,，：:=")


@dataclasses.dataclass(frozen=True)
class Intent:
    name: str
    topic: Topic
    language: Language
    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    accept: tuple[str, ...]
    brief: str | None = None

    def is_held_out(self, wording: str) -> bool:
        """Whether a wording is never trained on, nor one that differs in case or marks only."""
        if len(self.wordings) < 4 or bare(wording) == bare(self.wordings[0]):
            return False
        return zlib.crc32(f"{self.name}|{self.language}|{bare(wording)}".encode()) % HELD_OUT_SHARE == 0

    @cached_property
    def trained_wordings(self) -> tuple[str, ...]:
        return tuple(wording for wording in self.wordings if not self.is_held_out(wording))

    @cached_property
    def held_out_wordings(self) -> tuple[str, ...]:
        return tuple(wording for wording in self.wordings if self.is_held_out(wording))


def load(name: str) -> Any:
    return yaml.safe_load((TEXT / f"{name}.yaml").read_text(encoding="utf-8"))


def first_sentence(answer: str, language: Language) -> str:
    """The short form of an answer. A line break or a sentence end after ten characters closes it."""
    ends = (". ", ": ", "! ", "\n") if language == "en" else ("。", "：", "！", "\n")
    cut = min((place for end in ends if (place := answer.find(end, 10)) > 0), default=-1)
    if cut < 0:
        return answer
    head = answer[:cut].rstrip(".:!。：！")
    return head + ("." if language == "en" else "。")


def written_intents(name: str, topic: Topic) -> Iterator[Intent]:
    """The intents of reprise.yaml and smalltalk.yaml, written out one by one."""
    for entry in load(name):
        for language in LANGUAGES:
            text = entry[language]
            yield Intent(
                name=entry["id"],
                topic=topic,
                language=language,
                wordings=tuple(text["q"]),
                answers=tuple(text["a"]),
                accept=tuple(entry["accept"][language]),
            )


PARAMETER_WORDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What does {p} do?",
        "What is {p}?",
        "What does `{p}` mean?",
        "What is the parameter {p} for?",
        "Explain {p}.",
        "What is the {p} parameter?",
        "Tell me about {p}.",
        "How do I use {p}?",
        "Explain the parameter {p}.",
        "{p}",
        "{p}?",
        "What does the parameter {p} do?",
        "What is {p} for?",
        "Describe `{p}`.",
        "When do I use {p}?",
        "I do not understand {p}.",
        "What is meant by {p}?",
        "Can you explain {p}?",
        "What does {p} mean?",
    ),
    "zh": (
        "{p} 是什么？",
        "{p} 有什么用？",
        "`{p}` 是什么意思？",
        "参数 {p} 是做什么的？",
        "解释一下 {p}。",
        "什么是 {p}？",
        "怎么用 {p}？",
        "说说 {p}。",
        "{p} 参数是什么？",
        "{p} 怎么用？",
        "{p} 这个参数有什么用？",
        "{p} 的作用是什么？",
        "我不懂 {p}。",
        "介绍一下 {p}。",
        "参数 {p} 有什么作用？",
    ),
}


def parameter_intents() -> Iterator[Intent]:
    for entry in load("parameters"):
        for language in LANGUAGES:
            wordings = [wording.format(p=entry["name"]) for wording in PARAMETER_WORDINGS[language]]
            wordings += entry.get("ask", {}).get(language, [])
            yield Intent(
                name=f"parameter {entry['name']}",
                topic="reprise",
                language=language,
                wordings=tuple(wordings),
                answers=(entry[language],),
                accept=tuple(entry["accept"][language]),
            )


def knowledge_intents() -> Iterator[Intent]:
    for entry in load("knowledge"):
        for language, key in (("en", "e"), ("zh", "z")):
            *wordings, answer = entry[key]
            yield Intent(
                name=f"knowledge {entry['e'][0]}",
                topic="knowledge",
                language=language,  # type: ignore[arg-type]
                wordings=tuple(wordings),
                answers=(answer,),
                accept=tuple(str(part) for part in entry["accept"][language]),
            )


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def row_intent(
    name: str,
    language: Language,
    wordings: tuple[str, ...],
    answer: str,
    key: str,
    topic: Topic = "tables",
    **fields: object,
) -> Intent:
    """The intent of one row of a table: templates and the fields that fill them."""
    start = capitalise if language == "en" else str
    return Intent(
        name=name,
        topic=topic,
        language=language,
        wordings=tuple(dict.fromkeys(start(wording.format(**fields)) for wording in wordings)),
        answers=(capitalise(answer.format(key=key, **fields)),),
        accept=(key,),
        brief=capitalise(key) + ("." if language == "en" else "。") if topic == "tables" else None,
    )


CAPITAL_WORDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the capital of {country}?",
        "What's the capital of {country}?",
        "The capital of {country}?",
        "Name the capital of {country}.",
        "Which city is the capital of {country}?",
        "Tell me the capital of {country}.",
        "Capital of {country}",
        "Do you know the capital of {country}?",
        "{country}: what is its capital?",
        "What is {country}'s capital?",
        "Which is the capital city of {country}?",
        "What city is the capital of {country}?",
    ),
    "zh": (
        "{country}的首都是哪里？",
        "{country}的首都是什么？",
        "{country}首都是哪里？",
        "{country}的首都？",
        "哪个城市是{country}的首都？",
        "告诉我{country}的首都。",
        "{country}的首都在哪里？",
        "你知道{country}的首都吗？",
        "{country}的首都叫什么？",
        "{country}的首都是哪个城市？",
    ),
}


@cache
def countries() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row) for row in load("tables")["countries"])


def country_intents() -> Iterator[Intent]:
    for country, guo, capital, shoudu, continent, zhou in countries():
        yield row_intent(
            f"capital {country}",
            "en",
            CAPITAL_WORDINGS["en"],
            "The capital of {country} is {key}.",
            capital.rstrip("."),
            country=country,
        )
        yield row_intent(
            f"capital {country}",
            "zh",
            CAPITAL_WORDINGS["zh"],
            "{country}的首都是{key}。",
            shoudu,
            country=guo,
        )
        yield row_intent(
            f"continent {country}",
            "en",
            (
                "On which continent is {country}?",
                "Where is {country}?",
                "Which continent is {country} in?",
                "In which part of the world is {country}?",
                "What continent is {country} on?",
            ),
            "{country} is in {key}.",
            continent,
            country=country,
        )
        yield row_intent(
            f"continent {country}",
            "zh",
            ("{country}在哪个洲？", "{country}在哪里？", "{country}属于哪个洲？", "{country}位于哪个大洲？"),
            "{country}在{key}。",
            zhou,
            country=guo,
        )
        if country in {"England", "Luxembourg", "Tunisia"}:
            continue
        yield row_intent(
            f"country of {capital}",
            "en",
            (
                "{capital} is the capital of which country?",
                "Which country has the capital {capital}?",
                "In which country is {capital}?",
                "Of which country is {capital} the capital?",
                "Where is {capital}?",
            ),
            "{capital} is the capital of {key}.",
            country,
            capital=capital.rstrip("."),
        )
        yield row_intent(
            f"country of {capital}",
            "zh",
            (
                "{capital}是哪个国家的首都？",
                "{capital}在哪个国家？",
                "哪个国家的首都是{capital}？",
                "{capital}在哪里？",
            ),
            "{capital}是{key}的首都。",
            guo,
            capital=shoudu,
        )


def opposite_intents() -> Iterator[Intent]:
    for row in load("tables")["opposites"]:
        first, second, yi, er = (str(word).lower() for word in row)
        for one, other in ((first, second), (second, first)):
            yield row_intent(
                f"opposite {one}",
                "en",
                (
                    "What is the opposite of {one}?",
                    "The opposite of {one}?",
                    "Which word is the opposite of {one}?",
                    "Tell me the opposite of {one}.",
                    'What is the opposite of "{one}"?',
                    "Opposite of {one}",
                ),
                "The opposite of {one} is {key}.",
                other,
                one=one,
            )
        for one, other in ((yi, er), (er, yi)):
            yield row_intent(
                f"opposite {one}",
                "zh",
                (
                    "{one}的反义词是什么？",
                    "“{one}”的反义词是什么？",
                    "{one}的反面是什么？",
                    "什么是{one}的反义词？",
                    "{one}的反义词？",
                ),
                "{one}的反义词是{key}。",
                other,
                one=one,
            )


def word_intents() -> Iterator[Intent]:
    for row in load("tables")["words"]:
        english, chinese = (str(word) for word in row)
        yield row_intent(
            f"chinese {english}",
            "en",
            (
                "How do you say {word} in Chinese?",
                "What is {word} in Chinese?",
                "Translate {word} into Chinese.",
                "What is the Chinese word for {word}?",
                "{word} in Chinese?",
                'How do I say "{word}" in Chinese?',
                'Translate "{word}" into Chinese.',
            ),
            'In Chinese, "{word}" is {key}.',
            chinese,
            word=english,
        )
        yield row_intent(
            f"meaning {chinese}",
            "en",
            (
                "What does {word} mean?",
                "What does {word} mean in English?",
                "Translate {word} into English.",
                "What is {word} in English?",
                "{word} in English?",
            ),
            '{word} means "{key}".',
            english,
            word=chinese,
        )
        yield row_intent(
            f"english {chinese}",
            "zh",
            (
                "{word}用英文怎么说？",
                "{word}的英文是什么？",
                "把{word}翻译成英文。",
                "“{word}”用英语怎么说？",
                "{word}英文怎么说？",
                "{word}的英语是什么？",
            ),
            "“{word}”的英文是 {key}。",
            english,
            word=chinese,
        )
        yield row_intent(
            f"meaning {english}",
            "zh",
            (
                "{word} 是什么意思？",
                "{word} 的中文是什么？",
                "把 {word} 翻译成中文。",
                "{word} 用中文怎么说？",
                "{word} 中文怎么说？",
            ),
            "{word} 的意思是“{key}”。",
            chinese,
            word=english,
        )


def sound_intents() -> Iterator[Intent]:
    for animal, sound, dongwu, shengyin in load("tables")["sounds"]:
        article = "an" if animal[0] in "aeiou" else "a"
        yield row_intent(
            f"sound {animal}",
            "en",
            (
                "What does {article} {animal} say?",
                "What sound does {article} {animal} make?",
                "Which sound does the {animal} make?",
                "What does the {animal} say?",
                "How does {article} {animal} sound?",
            ),
            "The {animal} says {key}.",
            sound,
            animal=animal,
            article=article,
        )
        yield row_intent(
            f"sound {animal}",
            "zh",
            ("{animal}怎么叫？", "{animal}的叫声是什么？", "{animal}是怎么叫的？", "{animal}发出什么声音？"),
            "{animal}叫起来是{key}。",
            shengyin,
            animal=dongwu,
        )


def calendar_intents() -> Iterator[Intent]:
    tables = load("tables")
    days: list[list[str]] = tables["weekdays"]
    months: list[list[str]] = tables["months"]
    for unit, ling, rows in (("day", "天", days), ("month", "个月", months)):
        for place, row in enumerate(rows):
            following = rows[(place + 1) % len(rows)]
            previous = rows[place - 1]
            for way, hou, other in (("after", "后", following), ("before", "前", previous)):
                yield row_intent(
                    f"{unit} {way} {row[0]}",
                    "en",
                    (
                        "Which {unit} comes {way} {item}?",
                        "What {unit} comes {way} {item}?",
                        "What comes {way} {item}?",
                        "What is the {unit} {way} {item}?",
                        "Tell me the {unit} {way} {item}.",
                    ),
                    "{key} comes {way} {item}.",
                    other[0],
                    unit=unit,
                    way=way,
                    item=row[0],
                )
                yield row_intent(
                    f"{unit} {way} {row[0]}",
                    "zh",
                    (
                        "{item}的{hou}一{ling}是什么？",
                        "{item}{hou}一{ling}是什么？",
                        "{item}{hou}面是什么？",
                        "{item}之{hou}是什么？",
                    ),
                    "{item}的{hou}一{ling}是{key}。",
                    other[1],
                    hou=hou,
                    ling=ling,
                    item=row[1],
                )
    ordinals: list[str] = tables["ordinals"]
    for place, (month, yue, length) in enumerate(months):
        yield row_intent(
            f"length of {month}",
            "en",
            (
                "How many days does {month} have?",
                "How many days are in {month}?",
                "How long is {month}?",
                "How many days are there in {month}?",
            ),
            "{month} has {key} days." if month != "February" else "{month} has {key} days, and 29 in a leap year.",
            str(length),
            month=month,
        )
        yield row_intent(
            f"length of {month}",
            "zh",
            ("{month}有多少天？", "{month}有几天？", "{month}一共多少天？", "{month}是多少天？"),
            "{month}有 {key} 天。" if month != "February" else "{month}有 {key} 天，闰年有 29 天。",
            str(length),
            month=yue,
        )
        yield row_intent(
            f"{ordinals[place]} month",
            "en",
            (
                "What is the {nth} month?",
                "Which month is the {nth}?",
                "What is the {nth} month of the year?",
                "Name the {nth} month.",
            ),
            "The {nth} month is {key}.",
            month,
            nth=ordinals[place],
        )
    for place, (day, xingqi) in enumerate(days):
        yield row_intent(
            f"{ordinals[place]} day",
            "en",
            (
                "What is the {nth} day of the week?",
                "Which day is the {nth} of the week?",
                "Name the {nth} day of the week.",
                "What is day {number} of the week?",
            ),
            "The {nth} day of the week is {key}.",
            day,
            nth=ordinals[place],
            number=place + 1,
        )
        yield row_intent(
            f"{ordinals[place]} day",
            "zh",
            ("一周的第{nth}天是什么？", "一周第{nth}天是哪天？", "一个星期的第{nth}天是什么？"),
            "一周的第{nth}天是{key}。",
            xingqi,
            nth="一二三四五六七"[place],
        )


SUM_WORDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is {a} {sign} {b}?",
        "{a} {sign} {b}",
        "What is {a} {word} {b}?",
        "How much is {a} {sign} {b}?",
        "{a}{sign}{b}",
        "{a} {sign} {b} = ?",
        "{a}{sign}{b}=?",
        "How much is {a} {word} {b}?",
        "Calculate {a} {sign} {b}.",
        "{a} {sign} {b} =",
        "{a} {word} {b}",
        "What's {a} {sign} {b}?",
        "What is {a}{sign}{b}?",
    ),
    "zh": (
        "{a} {sign} {b} 等于多少？",
        "{a}{sign}{b}等于几？",
        "{a}{sign}{b}等于多少？",
        "{a} {word} {b} 等于多少？",
        "{a}{word}{b}等于几？",
        "{a} {sign} {b} 是多少？",
        "计算 {a} {sign} {b}。",
        "{a}{sign}{b}=？",
        "{a}{word}{b}是多少？",
        "请算 {a} {sign} {b}。",
    ),
}


def sums() -> Iterator[tuple[int, str, int, int]]:
    """Every sum that pocket learns: (a, sign, b, result)."""
    for a in range(21):
        for b in range(21):
            yield a, "+", b, a + b
            if b <= a:
                yield a, "-", b, a - b
    for a in range(1, 11):
        for b in range(1, 11):
            yield a, "*", b, a * b


def sum_intents() -> Iterator[Intent]:
    numbers = [tuple(row) for row in load("tables")["numbers"]]
    words = {"+": ("plus", "加"), "-": ("minus", "减"), "*": ("times", "乘以")}
    for a, sign, b, result in sums():
        plus, jia = words[sign]
        english = [wording.format(a=a, b=b, sign=sign, word=plus) for wording in SUM_WORDINGS["en"]]
        chinese = [wording.format(a=a, b=b, sign=sign, word=jia) for wording in SUM_WORDINGS["zh"]]
        if sign == "*":
            english += [f"{a} x {b}", f"What is {a} x {b}?", f"{a} × {b}"]
            chinese += [f"{a} × {b} 等于多少？", f"{a}乘{b}等于几？", f"{a}×{b}=？"]
        if a <= 10 and b <= 10:
            english.append(f"What is {numbers[a][0]} {plus} {numbers[b][0]}?")
            english.append(f"How much is {numbers[a][0]} {plus} {numbers[b][0]}?")
            chinese.append(f"{numbers[a][1]}{jia}{numbers[b][1]}等于几？")
            chinese.append(f"{numbers[a][1]}{jia}{numbers[b][1]}等于多少？")
        for language, wordings, end in (("en", english, "."), ("zh", chinese, "。")):
            yield Intent(
                name=f"sum {a} {sign} {b}",
                topic="sums",
                language=language,  # type: ignore[arg-type]
                wordings=tuple(wordings),
                answers=(f"{a} {sign} {b} = {result}{end}",),
                accept=(f"= {result}{end}",),
                brief=f"{result}{end}",
            )


def number_intents() -> Iterator[Intent]:
    """The order of numbers, even and odd, counting."""

    def both(name: str, english: tuple[tuple[str, ...], str], chinese: tuple[tuple[str, ...], str]) -> Iterator[Intent]:
        for language, (wordings, answer) in zip(LANGUAGES, (english, chinese), strict=True):
            yield Intent(name, "numbers", language, wordings, (answer,), (answer,))

    for number in range(31):
        yield from both(
            f"after {number}",
            (
                (
                    f"What comes after {number}?",
                    f"Which number comes after {number}?",
                    f"What number comes after {number}?",
                    f"What is the number after {number}?",
                ),
                f"{number + 1} comes after {number}.",
            ),
            (
                (
                    f"{number} 后面是几？",
                    f"{number}后面是什么数？",
                    f"{number} 的后一个数是几？",
                    f"{number} 之后是几？",
                ),
                f"{number} 后面是 {number + 1}。",
            ),
        )
    for number in range(1, 31):
        yield from both(
            f"before {number}",
            (
                (
                    f"What comes before {number}?",
                    f"Which number comes before {number}?",
                    f"What number comes before {number}?",
                    f"What is the number before {number}?",
                ),
                f"{number - 1} comes before {number}.",
            ),
            (
                (
                    f"{number} 前面是几？",
                    f"{number}前面是什么数？",
                    f"{number} 的前一个数是几？",
                    f"{number} 之前是几？",
                ),
                f"{number} 前面是 {number - 1}。",
            ),
        )
    for number in range(21):
        kind, shu = ("even", "偶数") if number % 2 == 0 else ("odd", "奇数")
        yield from both(
            f"parity {number}",
            (
                (
                    f"Is {number} even or odd?",
                    f"Is {number} odd or even?",
                    f"Is {number} even?",
                    f"Is {number} odd?",
                ),
                f"{number} is {kind}.",
            ),
            (
                (
                    f"{number} 是奇数还是偶数？",
                    f"{number}是偶数还是奇数？",
                    f"{number} 是偶数吗？",
                    f"{number} 是奇数吗？",
                ),
                f"{number} 是{shu}。",
            ),
        )
    for start, end in (
        (1, 3),
        (1, 5),
        (1, 10),
        (1, 12),
        (1, 15),
        (1, 20),
        (1, 30),
        (5, 10),
        (10, 20),
        (3, 9),
        (7, 12),
    ):
        for first, last in ((start, end), (end, start)):
            step = 1 if last > first else -1
            line = [str(number) for number in range(first, last + step, step)]
            yield from both(
                f"count {first} {last}",
                (
                    (
                        f"Count from {first} to {last}.",
                        f"Can you count from {first} to {last}?",
                        f"Please count from {first} to {last}.",
                        f"Write the numbers from {first} to {last}.",
                        f"List the numbers from {first} to {last}.",
                    )
                    + ((f"Count to {last}.", f"Count up to {last}.") if first == 1 else ()),
                    ", ".join(line) + ".",
                ),
                (
                    (
                        f"从 {first} 数到 {last}。",
                        f"从{first}数到{last}",
                        f"请从 {first} 数到 {last}。",
                        f"写出从 {first} 到 {last} 的数。",
                    )
                    + ((f"数到 {last}。",) if first == 1 else ()),
                    "、".join(line) + "。",
                ),
            )


def made_up_word(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(["", "n", "s", "l"])


def large_sums(rng: random.Random) -> Iterator[tuple[int, str, int]]:
    """Sums that are too large for pocket."""
    for _ in range(150):
        a, b = rng.randint(21, rng.choice((60, 999, 9999))), rng.randint(2, rng.choice((99, 999)))
        if rng.random() < 0.3:
            a, b = b, a
        yield a, rng.choice("+-*/"), b


def unknown_intents() -> Iterator[Intent]:
    """The questions beyond pocket, in each language: those that people often ask, and many from patterns."""
    rng = random.Random(0)
    for language, text in load("unknown").items():
        questions: list[str] = []
        words = text["words"] + [made_up_word(rng) for _ in range(len(text["words"]) // 3)]
        for number, pattern in enumerate(text["patterns"]):
            questions += [capitalise(pattern.format(word)) for word in words[number % 2 :: 2]]
        column = 0 if language == "en" else 1
        places = [row[place] for row in countries() for place in (column, column + 2)]
        for number, pattern in enumerate(text["place_patterns"]):
            questions += [capitalise(pattern.format(place)) for place in places[number % 3 :: 3]]
        for a, sign, b in large_sums(rng):
            wording = rng.choice(SUM_WORDINGS[language][:4])
            word = {"+": "plus 加", "-": "minus 减", "*": "times 乘以", "/": "divided by 除以"}[sign]
            word = word.rpartition(" ")[2 * column]
            questions.append(wording.format(a=a, b=b, sign=sign, word=word))
        for name, wordings in (("unknown", text["questions"]), ("unknown pattern", questions)):
            yield Intent(
                name=name,
                topic="unknown",
                language=language,
                wordings=tuple(dict.fromkeys(wordings)),
                answers=tuple(text["answers"]),
                accept=tuple(text["accept"]),
            )


@cache
def intents() -> tuple[Intent, ...]:
    """Everything that pocket is taught, in a fixed order."""
    return (
        *written_intents("reprise", "reprise"),
        *parameter_intents(),
        *written_intents("smalltalk", "small talk"),
        *knowledge_intents(),
        *country_intents(),
        *opposite_intents(),
        *word_intents(),
        *sound_intents(),
        *calendar_intents(),
        *sum_intents(),
        *number_intents(),
        *unknown_intents(),
    )
