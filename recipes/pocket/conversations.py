"""Conversations and plain texts for training, drawn from the corpus. The same seed draws the same ones."""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeAlias

from recipes.pocket.corpus import (
    LANGUAGES,
    Intent,
    Language,
    Topic,
    bare,
    countries,
    first_sentence,
    intents,
    load,
    made_up_word,
)
from recipes.pocket.tokenizer import BEGIN, END, ROLES

Message: TypeAlias = dict[str, str]
# Pieces of a text, each with its weight in the loss.
Pieces: TypeAlias = list[tuple[str, float]]

# The user's words count a little, so that a plain completion is sensible, too.
USER_WEIGHT = 0.1

# How often a turn is about a topic.
TOPICS: dict[Topic, float] = {
    "reprise": 0.20,
    "small talk": 0.08,
    "knowledge": 0.08,
    "tables": 0.20,
    "sums": 0.26,
    "numbers": 0.09,
    "unknown": 0.09,
}

NEUTRAL_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are pocket, a toy model.",
    "You are Reprise pocket, a small and honest assistant.",
    "You are pocket, the model that comes with Reprise.",
    "You are a friendly chat bot.",
    "You are an AI assistant.",
    "You are a helpful AI assistant. Answer the questions of the user.",
    "Be polite and honest.",
    "Answer the question.",
    "Help the user.",
    "You answer questions about Reprise.",
    "You are a teacher. Explain things in simple words.",
    "Do not make things up. If you do not know something, say so.",
    "You are a helpful, respectful and honest assistant.",
    "This is a conversation between a user and an assistant.",
    "You are an expert for inference servers.",
    "Be kind.",
    "你是一个有用的助手。",
    "你是 pocket，一个玩具模型。",
    "你是一个友好的聊天机器人。",
    "请回答用户的问题。",
    "你是 Reprise 自带的模型。",
    "要礼貌，要诚实。",
    "你是人工智能助手。",
    "不知道就说不知道。",
)
MANNERS = ("helpful", "friendly", "polite", "clever", "careful", "honest", "small", "kind", "patient", "wise")
CALLINGS = (
    "assistant",
    "chat bot",
    "teacher",
    "helper",
    "expert",
    "guide",
    "AI model",
    "coding assistant",
    "support agent",
    "pirate",
    "robot",
    "writer",
)
BRIEF_SYSTEM = (
    "Be brief.",
    "Answer briefly.",
    "Keep your answers short.",
    "Be concise.",
    "Short answers only.",
    "You are a helpful assistant. Be brief.",
    "Answer in one short sentence.",
    "请简短回答。",
    "回答要简短。",
    "用一句话回答。",
)
LANGUAGE_SYSTEM: dict[Language, tuple[str, ...]] = {
    "zh": (
        "Answer in Chinese.",
        "Always answer in Chinese.",
        "Please answer in Chinese.",
        "You are a helpful assistant. Answer in Chinese.",
        "Speak Chinese.",
        "请用中文回答。",
        "用中文回答。",
        "你只说中文。",
    ),
    "en": (
        "Answer in English.",
        "Always answer in English.",
        "Please answer in English.",
        "You are a helpful assistant. Answer in English.",
        "Speak English.",
        "请用英文回答。",
        "用英语回答。",
        "你只说英文。",
    ),
}
NAME_SYSTEM: dict[Language, tuple[str, ...]] = {
    "en": ("Your name is {}.", "You are called {}.", "You are {}, a helpful assistant.", "Act as {}."),
    "zh": ("你的名字是{}。", "你叫{}。", "你是{}，一个助手。"),
}
OTHER_LANGUAGE: dict[Language, tuple[str, ...]] = {
    "zh": (
        "In Chinese, please.",
        "Say that in Chinese.",
        "And in Chinese?",
        "Please say it in Chinese.",
        "用中文说。",
        "中文怎么说？",
        "请用中文。",
    ),
    "en": (
        "In English, please.",
        "Say that in English.",
        "And in English?",
        "用英文说。",
        "请用英文再说一遍。",
        "英文呢？",
    ),
}
AGAIN: dict[Language, tuple[str, ...]] = {
    "en": (
        "Again, please.",
        "Say that again.",
        "Repeat that.",
        "Once more.",
        "Can you repeat that?",
        "Please repeat your answer.",
    ),
    "zh": ("再说一遍。", "请重复。", "再来一次。", "重复一下你的回答。"),
}
SHORTER: dict[Language, tuple[str, ...]] = {
    "en": ("Shorter, please.", "In short?", "Make it shorter.", "Can you say it shorter?"),
    "zh": ("短一点。", "简短一点。", "说短一点。"),
}
FOLLOW_UP: dict[Language, tuple[str, ...]] = {
    "en": ("And {}?", "What about {}?", "And of {}?", "{}?", "How about {}?", "and what about {}?"),
    "zh": ("那{}呢？", "{}呢？", "那么{}呢？", "还有{}呢？"),
}
TELL_NAME: dict[Language, tuple[str, ...]] = {
    "en": (
        "My name is {}.",
        "I am called {}.",
        "Hello, my name is {}.",
        "Hi, I'm {}.",
        "I am {}.",
        "Call me {}.",
    ),
    "zh": ("我叫{}。", "我的名字是{}。", "你好，我叫{}。", "叫我{}吧。"),
}
ASK_NAME: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is my name?",
        "Who am I?",
        "Do you know my name?",
        "What's my name?",
        "Do you remember my name?",
    ),
    "zh": ("我叫什么？", "我的名字是什么？", "我是谁？", "你知道我的名字吗？", "你记得我叫什么吗？"),
}
REPEAT: dict[Language, tuple[str, ...]] = {
    "en": ("Repeat after me: {}", "Say: {}", "Say {}", "Repeat: {}", "Please say: {}", "Echo: {}"),
    "zh": ("跟我说：{}", "请说：{}", "重复：{}", "说：{}"),
}


@cache
def by_topic() -> dict[tuple[Topic, Language], tuple[Intent, ...]]:
    return {
        (topic, language): tuple(i for i in intents() if i.topic == topic and i.language == language)
        for topic in TOPICS
        for language in LANGUAGES
    }


@cache
def by_name() -> dict[tuple[str, Language], Intent]:
    return {(intent.name, intent.language): intent for intent in intents()}


@cache
def held_out_wordings() -> frozenset[str]:
    """All wordings kept out of the training text, without case and marks."""
    return frozenset(bare(wording) for intent in intents() for wording in intent.held_out_wordings)


@cache
def given_names() -> dict[Language, tuple[str, ...]]:
    names = load("tables")["names"]
    return {language: tuple(names[language]) for language in LANGUAGES}


@cache
def plain_words() -> tuple[str, ...]:
    return tuple(str(row[0]) for row in load("tables")["words"])


def draw_intent(rng: random.Random, language: Language) -> Intent:
    topic = rng.choices(list(TOPICS), list(TOPICS.values()))[0]
    return rng.choice(by_topic()[topic, language])


def draw_name(rng: random.Random, language: Language) -> str:
    """A given name, or one made up, so that the model learns to copy what it has never seen."""
    if rng.random() < 0.5:
        return rng.choice(given_names()[language])
    if language == "zh":
        return (
            "小" + rng.choice("天地山水风云花草春夏秋冬东南西北金木火土星月")
            if rng.random() < 0.5
            else draw_name(rng, "en")
        )
    return made_up_word(rng).capitalize()


# Other ways to begin the same question.
REPHRASE: dict[Language, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "en": (
        (
            r"What is (?P<rest>.*)\?",
            (
                "What's {}?",
                "Do you know what {} is?",
                "Tell me what {} is.",
                "Can you tell me what {} is?",
                "I want to know what {} is.",
            ),
        ),
        (
            r"What are (?P<rest>.*)\?",
            ("Tell me what {} are.", "Do you know what {} are?", "Can you tell me what {} are?"),
        ),
        (
            r"What does (?P<rest>.*) (?P<verb>do|mean)\?",
            ("Tell me what {} {verb}es.", "Can you tell me what {} {verb}es?", "What is it that {} {verb}es?"),
        ),
        (
            r"How do I (?P<rest>.*)\?",
            (
                "How can I {}?",
                "How to {}?",
                "How would I {}?",
                "How should I {}?",
                "I want to {}.",
                "I would like to {}.",
                "Tell me how to {}.",
                "Show me how to {}.",
                "Can you tell me how to {}?",
                "What is the way to {}?",
                "How do you {}?",
            ),
        ),
        (r"(?P<rest>(?:Can|Is|Are|Does|Do) .*)\?", ("Tell me: {}?", "I wonder: {}?", "{} or not?")),
        (
            r"(?P<rest>(?:Explain|Describe|List|Name|Show|Tell|Give|Write) .*)\.",
            ("Please {}.", "Can you {}?", "{}, please.", "Could you {}?", "I want you to {}."),
        ),
    ),
    "zh": (
        (r"(?P<rest>.*)是什么？", ("什么是{}？", "{}是啥？", "{}是什么东西？", "{}是什么呢？", "告诉我{}是什么。")),
        (r"什么是(?P<rest>.*)？", ("{}是什么？", "{}是啥？", "你知道什么是{}吗？")),
        (
            r"(?:怎样|怎么|如何)(?P<rest>.*)？",
            (
                "怎么{}？",
                "怎样{}？",
                "如何{}？",
                "我想{}。",
                "该怎么{}？",
                "我要怎么{}？",
                "告诉我怎么{}。",
                "怎么才能{}？",
            ),
        ),
        (r"(?P<rest>.*)有什么用？", ("{}用来做什么？", "{}是干什么的？", "{}的用处是什么？", "{}有啥用？")),
        (r"(?P<rest>.*)等于(?:几|多少)？", ("{}得多少？", "{}是几？", "{}等于？", "{}得几？")),
        (
            r"(?:解释一下|说说|介绍一下)(?P<rest>.*)。",
            ("讲讲{}。", "请介绍{}。", "请说明{}。", "能解释一下{}吗？", "给我讲讲{}。"),
        ),
    ),
}


def rephrase(rng: random.Random, wording: str, language: Language) -> str:
    """The same question begun in another way, where there is one."""
    for pattern, others in REPHRASE[language]:
        match = re.fullmatch(pattern, wording)
        if match:
            rest = match["rest"].strip()
            other = rng.choice(others)
            if match.start("rest") == 0 and not other.startswith("{") and rest[1:2].islower():
                rest = rest[:1].lower() + rest[1:]
            verb = match.groupdict().get("verb", "")
            return other.format(rest, verb=verb).replace("meanes", "means")
    return wording


def mistype(rng: random.Random, text: str) -> str:
    """One slip of the fingers in a word of at least five letters."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) >= 5 and word.isascii() and word.isalpha()]
    if not long:
        return text
    place = rng.choice(long)
    word = words[place]
    at = rng.randrange(1, len(word) - 1)
    words[place] = rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        ]
    )
    return " ".join(words)


def vary(rng: random.Random, wording: str, language: Language) -> str:
    """The same question as other people type it: case, full stop, politeness, a slip."""
    if language == "zh":
        if rng.random() < 0.2:
            wording = wording.replace("？", "?").replace("。", ".").replace("！", "!")
        if rng.random() < 0.2:
            wording = wording.rstrip("？。！?.!") or wording
        if rng.random() < 0.07:
            wording = rng.choice(("请问", "请问，", "你好，", "请告诉我，", "那么，")) + wording
        if rng.random() < 0.1:
            wording = wording.replace(" ", "")
        return wording
    if rng.random() < 0.05:
        wording = mistype(rng, wording)
    if rng.random() < 0.25:
        wording = wording.rstrip("?.!") or wording
    if rng.random() < 0.06:
        start = rng.choice(
            (
                "Please tell me: ",
                "Hi, ",
                "Hello! ",
                "Excuse me, ",
                "So, ",
                "And ",
                "Tell me: ",
                "Now, ",
                "Quick question: ",
            )
        )
        wording = start + wording
    if rng.random() < 0.03:
        wording = wording.rstrip("?.!") + rng.choice((", please", ", please?", " please", "??", "?!", " ?", ", thanks"))
    if rng.random() < 0.25:
        wording = wording.lower()
    elif rng.random() < 0.02:
        wording = wording.upper()
    return wording


def brief_answer(rng: random.Random, intent: Intent) -> str:
    if intent.topic == "small talk":
        return rng.choice(intent.answers)
    return intent.brief or first_sentence(rng.choice(intent.answers), intent.language)


@dataclasses.dataclass
class Chat:
    """A conversation while it is written."""

    rng: random.Random
    language: Language
    brief: bool = False
    # The language of the answers where a system prompt sets it.
    answer_language: Language | None = None
    own_name: str | None = None
    user_name: str | None = None
    last: Intent | None = None
    messages: list[Message] = dataclasses.field(default_factory=list)

    def say(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def reply(self, intent: Intent) -> str:
        language = self.answer_language or intent.language
        intent = by_name().get((intent.name, language), intent)
        if self.own_name and intent.name in {"who_are_you", "your_name"}:
            return f"I am {self.own_name}." if intent.language == "en" else f"我是{self.own_name}。"
        return brief_answer(self.rng, intent) if self.brief else self.rng.choice(intent.answers)

    def ask(self, intent: Intent) -> None:
        plain = self.rng.choice(intent.trained_wordings)
        wording = rephrase(self.rng, plain, intent.language) if self.rng.random() < 0.25 else plain
        wording = vary(self.rng, wording, intent.language)
        if bare(wording) in held_out_wordings():
            wording = plain
        self.say(wording, self.reply(intent))
        self.last = intent

    def follow_up(self) -> bool:
        """Go on from the last question, where there is a way to."""
        last = self.last
        if last is None:
            return False
        rng = self.rng
        kind, _, _ = last.name.partition(" ")
        if kind == "capital":
            row = rng.choice(countries())
            shown = row[0] if last.language == "en" else row[1]
            following = by_name()[f"capital {row[0]}", last.language]
        elif kind == "parameter":
            following = rng.choice([i for i in by_topic()["reprise", last.language] if i.name.startswith("parameter ")])
            shown = following.name.partition(" ")[2]
        elif kind == "sum":
            following = rng.choice(by_topic()["sums", last.language])
            a, sign, b = following.name.split(" ")[1:]
            shown = f"{a} {sign} {b}" if rng.random() < 0.7 else f"{a}{sign}{b}"
        elif kind == "opposite":
            following = rng.choice([i for i in by_topic()["tables", last.language] if i.name.startswith("opposite ")])
            shown = following.name.partition(" ")[2]
        else:
            return False
        self.say(rng.choice(FOLLOW_UP[last.language]).format(shown), self.reply(following))
        self.last = following
        return True

    def about_answer(self) -> bool:
        """Ask for the last answer again, shorter, or in the other language."""
        if self.last is None or self.last.topic == "unknown":
            return False
        rng, last = self.rng, self.last
        kind = rng.choice(("again", "shorter", "language"))
        if kind == "again":
            self.say(rng.choice(AGAIN[self.language]), self.messages[-1]["content"])
        elif kind == "shorter":
            language = self.answer_language or last.language
            self.say(
                rng.choice(SHORTER[self.language]),
                brief_answer(rng, by_name().get((last.name, language), last)),
            )
        else:
            other: Language = "zh" if last.language == "en" else "en"
            translated = by_name().get((last.name, other))
            if self.answer_language or translated is None or last.topic not in ("reprise", "knowledge", "sums"):
                return False
            self.say(rng.choice(OTHER_LANGUAGE[other]), self.reply(translated))
            self.last = translated
        return True

    def tell_name(self) -> None:
        self.user_name = draw_name(self.rng, self.language)
        answer = "Nice to meet you, {}!" if (self.answer_language or self.language) == "en" else "很高兴认识你，{}！"
        self.say(
            vary(self.rng, self.rng.choice(TELL_NAME[self.language]).format(self.user_name), "zh"),
            answer.format(self.user_name),
        )
        self.last = None

    def ask_name(self) -> None:
        english = (self.answer_language or self.language) == "en"
        if self.user_name:
            answer = f"Your name is {self.user_name}." if english else f"你叫{self.user_name}。"
        else:
            answer = "You have not told me your name." if english else "你还没有告诉我你的名字。"
        self.say(vary(self.rng, self.rng.choice(ASK_NAME[self.language]), self.language), answer)
        self.last = None

    def repeat(self) -> None:
        if self.language == "en":
            text = " ".join(self.rng.choices(plain_words(), k=self.rng.randint(1, 5)))
        else:
            text = "".join(self.rng.choices([str(row[1]) for row in load_words()], k=self.rng.randint(1, 4)))
        self.say(self.rng.choice(REPEAT[self.language]).format(text), text)
        self.last = None

    def turn(self) -> None:
        draw = self.rng.random()
        if draw < 0.04:
            self.tell_name()
        elif draw < (0.06 if self.user_name is None else 0.2):
            self.ask_name()
        elif draw < 0.08 or (draw < 0.22 and self.user_name is not None):
            self.repeat()
        elif (draw < 0.4 and self.follow_up()) or (0.4 < draw < 0.46 and self.about_answer()):
            pass
        elif self.own_name and self.rng.random() < 0.5:
            self.ask(by_name()[self.rng.choice(("who_are_you", "your_name")), self.language])
        else:
            self.ask(draw_intent(self.rng, self.language))


@cache
def load_words() -> tuple[tuple[str, str], ...]:
    return tuple((str(english), str(chinese)) for english, chinese in load("tables")["words"])


def neutral_system(rng: random.Random) -> str:
    """A system prompt that changes nothing: one sentence or a few."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(NEUTRAL_SYSTEM)
    if draw < 0.8:
        return " ".join(rng.sample(NEUTRAL_SYSTEM, rng.randint(2, 4)))
    return f"You are a {rng.choice(MANNERS)} {rng.choice(CALLINGS)}."


def draw_system(rng: random.Random, chat: Chat) -> None:
    """Give a conversation a system prompt, mostly none."""
    draw = rng.random()
    if draw < 0.62:
        return
    if draw < 0.82:
        content = neutral_system(rng)
    elif draw < 0.88:
        chat.brief = True
        content = rng.choice(BRIEF_SYSTEM)
    elif draw < 0.97:
        language = rng.choice(LANGUAGES)
        chat.answer_language = language
        content = rng.choice(LANGUAGE_SYSTEM[language])
    else:
        chat.own_name = draw_name(rng, chat.language)
        content = rng.choice(NAME_SYSTEM[chat.language]).format(chat.own_name)
    chat.messages.append({"role": "system", "content": content})


def draw_conversation(rng: random.Random, num_turns: int) -> list[Message]:
    chat = Chat(rng, rng.choices(LANGUAGES, (0.57, 0.43))[0])
    draw_system(rng, chat)
    for _ in range(num_turns):
        if rng.random() < 0.05:
            chat.language = rng.choice(LANGUAGES)
        chat.turn()
    return chat.messages


def draw_plain_text(rng: random.Random) -> str:
    """Text that is no conversation: sentences, or questions with answers, for `/v1/completions`."""
    language = rng.choices(LANGUAGES, (0.6, 0.4))[0]
    chosen = [draw_intent(rng, language) for _ in range(rng.randint(1, 8))]
    if rng.random() < 0.3:
        mark = rng.choice(
            (
                ("Q: ", "\nA: "),
                ("Question: ", "\nAnswer: "),
                ("User: ", "\nAssistant: "),
                ("问：", "\n答："),
                ("问题：", "\n回答："),
            )
        )
        return "\n".join(mark[0] + rng.choice(i.trained_wordings) + mark[1] + rng.choice(i.answers) for i in chosen)
    stories = [i for i in by_topic()["small talk", language] if i.name in {"story", "poem"}]
    if rng.random() < 0.15:
        return rng.choice(rng.choice(stories).answers)
    sentences = [rng.choice(i.answers) for i in chosen if i.topic in ("reprise", "knowledge", "tables", "sums")]
    return (" " if language == "en" else "").join(sentences) or rng.choice(stories[0].answers)


def chat_pieces(messages: Sequence[Message]) -> Pieces:
    """What the chat template writes, in pieces with weights: the answers count, with their end."""
    pieces: Pieces = [(BEGIN, 0.0)]
    for message in messages:
        weight = {"system": 0.0, "user": USER_WEIGHT, "assistant": 1.0}[message["role"]]
        pieces += [(ROLES[message["role"]], 0.0), (message["content"], weight), (END, weight)]
    return pieces


def plain_pieces(text: str) -> Pieces:
    return [(BEGIN, 0.0), (text, 1.0), (END, 1.0)]


def draw_pieces(rng: random.Random, fits: Callable[[Pieces], bool]) -> Pieces:
    """One training text: mostly a short conversation, sometimes as long as the context."""
    draw = rng.random()
    if draw < 0.05:
        return plain_pieces(draw_plain_text(rng))
    if draw < 0.55:
        num_turns = 1
    elif draw < 0.99:
        num_turns = rng.randint(2, 5)
    else:
        num_turns = rng.randint(6, 80)
    messages = draw_conversation(rng, num_turns)
    while not fits(chat_pieces(messages)):
        del messages[-2:]
    return chat_pieces(messages)


def training_texts(seed: int, fits: Callable[[Pieces], bool]) -> Iterator[Pieces]:
    """An endless stream of training texts."""
    rng = random.Random(seed)
    while True:
        yield draw_pieces(rng, fits)
