"""Sentences that no caption has: of a model that refuses, or that speaks of its task.

What a person in the video says or a sign reads is not the model's own: quotations are left out.
"""

from __future__ import annotations

import re

from stages.captions.words import unquoted


def _any(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


_SEEN = (
    r"(?:see|view|watch|access|open|read) (?:the|this|that|any|your|an?)? ?"
    r"(?:videos?|images?|clips?|captions?|frames?|files?|links?|content|attachments?)"
)
_TASK = (
    r"(?:assist|help|fulfil+|comply|provide|create|generate|rewrite|rephrase|describe|caption|"
    r"produce|write|identify|recognize|process|analy[sz]e|engage|complete|continue|answer|"
    rf"respond|determine|discuss|offer|do that|{_SEEN})"
)
_CANNOT = (
    r"(?:can(?:no|')t|can not|won't|will not|(?: am|'m) unable to|"
    r"(?: am|'m) not (?:able to|programmed|allowed|comfortable))"
)
_OBJECT = r"(?:caption|video|image|request|content)"
_SORRY = (
    r"(?:i(?:'m| am) (?:so |very |really |truly )?sorry|sorry|my apologies|"
    r"(?:i|we) (?:sincerely )?apologi[sz]e|unfortunately|regrettably)"
)
_ABOUT = (
    r"(?:for the confusion|for any inconvenience|as an? |there (?:is|was) no|no |"
    rf"(?:i|we|(?:the|this) {_OBJECT}|it|that|your) (?:do|did|can|could|am|was|have|is|seems?|"
    r"appears?|contains?|violates?|goes|request|caption|'m|won't|will))"
)
_MODEL = r"(?:ai|artificial intelligence|(?:large )?language model|text-based|assistant)"

# Of a model that refuses, or asks for its input.
_REFUSAL = re.compile(
    _any(
        # At the beginning of a sentence, in the model's own voice.
        rf"(?:\A|[.!?:;]\s+){_SORRY},?(?: but)?,? {_ABOUT}",
        rf"\b(?:i|we) ?{_CANNOT} (?:\w+ly )?(?:be able to )?{_TASK}\b",
        r"\bi (?:must|have to|need to|will|would) (?:respectfully )?(?:decline|refuse)\b",
        r"\bi(?:'d| would) (?:rather|prefer) not\b",
        r"\bi need (?:the|a|your|an) (?:\w+ )?(?:caption|video|text|image|description)\b",
        rf"\bas an? {_MODEL}\b(?:.{{0,40}}\b(?:i|my)\b|[^.]{{0,20}}(?:model|assistant))",
        r"\bi (?:do not|don't) have (?:the ability|access|enough|the capability|sufficient|"
        r"any (?:information|context))",
        r"\b(?:against|violates?) (?:my|our|the|content|usage) (?:\w+ )?"
        r"(?:guidelines|policy|policies|programming)",
        # Nothing to work on.
        r"\b(?:provided|given|original|input) (?:caption|text|video|image) "
        r"(?:is|was|appears|does|seems|contains)\b",
        r"\bnothing to (?:rewrite|rephrase|describe|caption)\b",
        r"\b(?:no|not|n't) (?:\w+ )?(?:provided?|given|included|supplied|received?|shared|"
        r"attach(?:ed)?) (?:\w+ ){0,3}(?:captions?|videos?|text|images?|frames?)\b",
        r"\bno (?:caption|video|text|image|content) (?:\w+ ){0,3}(?:provided|given|included|"
        r"supplied|to (?:re)?(?:write|phrase|describe|work with))",
        r"\b(?:please|could you|can you|would you|kindly)[, ](?:\w+ ){0,3}(?:provide|share|"
        r"supply|send|upload|paste|specify|clarify|give me)\b",
        r"\b(?:caption|text|input|prompt)s? (?:that )?you(?:'ve| have)? "
        r"(?:provided|gave|given|shared|supplied)",
        # In other languages: the commonest openings alone.
        r"\A(?:抱歉|对不起|很抱歉|不好意思|申し訳|すみません|죄송)",
        r"作为.{0,4}(?:AI|人工智能|语言模型)",
        r"\A(?:je suis désolée?|désolée?,|lo siento|es tut mir leid|mi dispiace|desculpe|"
        r"sinto muito|leider kann ich|извините|к сожалению, я)",
    ),
    re.IGNORECASE,
)

_THING = r"(?:video|clip|footage|image|picture|photo|caption|frames?|recording|animation|film)"
_VERB = (
    r"(?:shows?|depicts?|features?|captures?|displays?|presents?|portrays?|illustrates?|begins?|"
    r"starts?|opens?|showcases?|describes?|contains?|follows?|focus(?:es)?|ends?|consists?|"
    r"documents?|records?|demonstrates?|highlights?|provides?|appears? to|seems? to|takes place|"
    r"is (?:of|about|a|an|set|showing|titled|shot))"
)
_SHORT = r"(?:(?:short|brief|provided|given|following|next|entire) )?"
_NEW = (
    r"(?:re-?written|revised|rephrased|refined|reworded|new|updated|improved|final|concise|short|"
    r"shortened|enhanced|possible|suggested|original|video|clip|detailed|medium|long|english)"
)
_PRODUCT = (
    r"(?:captions?|prompt|description|version|rewrite|rewording|answer|output|response|text|"
    r"summary|paraphrase|translation)"
)

# Of a model that speaks of its answer, or of the video as a video.
_META = re.compile(
    _any(
        r"\A(?:sure(?: thing)?|certainly|absolutely|of course|okay|ok|got it|understood|great|"
        r"no problem|alright|yes)(?:!|\.|,? (?:here|i|let|below|the (?:re|new))|: )",
        r"\A(?:sure|certainly|of course|absolutely|okay),",
        r"(?:\A|[.!]\s+)(?:here(?:'s| is| are)|below is|this is|the following is) "
        rf"(?:(?:the|a|an|my|your|one|how) )?(?:{_NEW},? )*(?:\w+-word )?{_PRODUCT}\b",
        r"\A(?:so,? )?(?:here(?:'s| is)|this is) what\b",
        rf"\A\W*(?:(?:the|my|a) )?(?:{_NEW} )*{_PRODUCT}(?: \d+)?(?: \([^)]*\))?\W*:",
        r"\A(?:(?:the|my) )?(?:rewritten|revised|rephrased|reworded) "
        r"(?:caption|prompt|version)\b",
        rf"\A(?:in )?(?:this|the) {_SHORT}(?:\w+-)?(?:video )?{_THING} {_VERB}\b",
        rf"\Ain (?:this|the) {_SHORT}(?:video )?{_THING}(?:,| we| you)",
        rf"\Ain this (?:\w+ ){{1,2}}{_THING},",
        r"\Aas (?:requested|instructed|you (?:asked|requested))\b",
        r"\A(?:this|the) (?:opening )?scene "
        r"(?:shows|depicts|captures|features|portrays|displays)\b",
        rf"\A(?:this|it) is an? (?:\w+ )?(?:video )?{_THING} "
        r"(?:of|that|in|show|about|which|where)",
        rf"\A(?:we|you) (?:can )?see\b(?=.*\b{_THING}\b)",
        r"\A(?:based on|according to|given) (?:the|this|your) (?:\w+ )?"
        rf"(?:{_THING}|description|information|text|prompt)",
        r"\A(?:i(?:'ve| have)? (?:re-?wr|rephrase|revise|shorten)|i(?:'ll| will) |let me )",
        # Closings.
        r"\bi hope (?:this|that|it) helps?\b|\blet me know (?:if|whether|what)\b",
        r"\bfeel free to\b|\bis there anything else\b|\bwould you like me to\b",
        r"[\[(](?:(?:total |approx\w*\.? |about |word count: ?)?\d+ words?(?: total| exactly)?|"
        r"word count[^)\]]*)[\])]|\bword count: ?\d+",
        r"\b(?:note|explanation|disclaimer): ?(?:i|the (?:caption|rewrite|rewritten|original)|"
        r"this (?:caption|rewrite|version)|as |since )",
        r"\b(?:the|this|my) (?:rewritten|revised|original|rephrased) "
        r"(?:caption|version|text)\b",
        r"[\[(](?:note|rewritten|rephrased|revised|this (?:version|caption|rewrite))\b",
        # Marks of a chat template.
        r"<\|?(?:im_end|im_start|end|assistant|user|system|eot_id|endoftext|think)\|?>",
        r"\[/?INST\]",
    ),
    re.IGNORECASE,
)


# Of a model that was shown frames. Apart, as a caption of text may speak of a bowler's last frame.
_FRAMES = r"(?:frames?|images?|pictures?|photos?|stills?|screenshots?|snapshots?)"
_NTH = r"(?:first|second|third|fourth|fifth|last|final|next|initial|subsequent|previous|following)"
_OF_FRAMES = re.compile(
    _any(
        r"\b(?:frame|image|picture|photo) (?:\d+|one|two)\b",
        rf"\b(?:the|each|every) {_NTH} (?:few |two |three |four )?{_FRAMES}\b",
        rf"\b(?:provided|given|submitted|uploaded) {_FRAMES}\b",
        rf"\b(?:these|those|all the|all of the) (?:\w+ )?{_FRAMES} (?!of\b|on\b|hang|hung)",
        r"\b(?:in|across|between|throughout|through|over|from) (?:the|these|all|each|all the|"
        r"each of the|consecutive|successive) frames\b",
        r"\bfrom (?:one )?frame to (?:the next|frame)\b|\bframe by frame\b",
        rf"\b(?:sequence|series|set|collection) of (?:\w+ )?{_FRAMES}\b",
        rf"\bthe (?:video|clip|footage|frames|images) (?:\w+ly |then |also )?(?:{_VERB}|"
        r"progress(?:es)?|continues?|concludes?|transitions?|unfolds?|cuts?|do|does|suggests?)\b",
        r"\b(?:throughout|in|of|during) (?:the|this) (?:\w+ )?(?:video|clip|footage)\b",
    ),
    re.IGNORECASE,
)
_UNSEEN = re.compile(
    _any(
        r"\b(?:images?|frames?|videos?|clips?|pictures?|footage|screen) (?:provided |given )?"
        r"(?:is|are|was|were|appears?|seems?) (?:\w+ ){0,3}(?:too (?:dark|blurry|blurred|bright|"
        r"small|unclear|low)|(?:completely|entirely|all) (?:black|dark|blank|white)|unclear|blank|"
        r"empty|corrupted|missing)",
        r"\b(?:it is |it's )?(?:not possible|impossible) to (?:determine|describe|tell|identify|"
        r"discern|say|make out)\b",
        r"\bthere (?:is|are) (?:no|not enough|nothing) (?:\w+ ){0,2}(?:to describe|information|"
        r"visible content|content to|discernible)\b",
    ),
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """`text` as the patterns expect it: on one line, straight apostrophes, no quotations."""
    text = " ".join(text.replace("’", "'").replace("`", "'").split())
    return unquoted(text.lstrip("*_#> ").rstrip("*_ "))


def refuses(text: str, sees: bool = False) -> bool:
    """Whether the model says that it can't or won't, or asks for its input; of one that `sees`
    frames, also that it can make out nothing."""
    plain = _plain(text)
    return bool(_REFUSAL.search(plain) or (sees and _UNSEEN.search(plain)))


def speaks_of_task(text: str, sees: bool = False) -> bool:
    """Whether the answer opens or closes with words about the answer or the video; of a model that
    `sees` frames, whether it speaks of them anywhere."""
    plain = _plain(text)
    return bool(_META.search(plain) or (sees and _OF_FRAMES.search(plain)))


# Openers that can be cut off, and leave a caption.
_OPENER = re.compile(
    _any(
        r"(?:sure(?: thing)?|certainly|absolutely|of course|okay|ok)[!.,:]\s*",
        r"(?:here(?:['’]s| is)|below is|the following is) (?:(?:the|a|an|my|your) )?"
        rf"(?:{_NEW},? )*(?:\w+-word )?{_PRODUCT}\b[^:.\"“]{{0,60}}:\s*",
        rf"[*#\s]*(?:(?:the|my|a) )?(?:{_NEW} )*{_PRODUCT}(?: \d+)?\s*[*]*:[*\s]*",
        rf"(?:in )?(?:this|the) {_SHORT}(?:\w+-)?(?:video )?{_THING} (?:shows|depicts|features|"
        r"captures|displays|presents|portrays|showcases) (?!how\b|that\b|what\b)",
        rf"in (?:this|the) {_SHORT}(?:video )?{_THING},? (?:we (?:can )?see )?",
        rf"this is an? {_SHORT}(?:video )?{_THING} of ",
    ),
    re.IGNORECASE,
)
_CLOSER = re.compile(
    r"\s*[\[(](?:(?:total|about|word count):? ?)?\d+ words?[\])]\s*\Z", re.IGNORECASE
)


def trimmed(text: str) -> str:
    """A caption without the words about itself or the video that it opens with, or the count of
    words that it ends with: "The video shows a dog." is "A dog." """
    rest = _CLOSER.sub("", text)
    for _ in range(3):  # "Sure! Here is the caption: The video shows ..."
        found = _OPENER.match(rest)
        if found is None:
            break
        rest = rest[found.end() :]
    return text if rest == text else rest[:1].upper() + rest[1:]
