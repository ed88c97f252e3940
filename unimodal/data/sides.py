"""Which captions say something that a mirrored picture makes false."""

import re
import unicodedata

# Words of English that begin or end with a side, or turn, and are no other word: "leftmost", "right-hand", "topleft",
# "anticlockwise", "eastern". "bright", "upright", "leftover" and "copyright" name no side.
SIDE = re.compile(
    r"(?:top|bottom|upper|lower|front|back|rear|middle|mid|centre|center|far)?(?:left|right)(?:s|most|ward|wards|hand|handed|hander|side|sided)?"
    r"|lefty|lefties|righty|righties|(?:anti|counter)?clockwise"
    r"|(?:north|south)?(?:east|west)(?:ern|ernmost|erly|ward|wards|bound|side)?"
)


def names_a_side(caption: str) -> bool:
    """Whether an English caption holds a word of left and right, of a turn, or of east and west.

    Case, punctuation, hyphens and joined words do not matter: "Left,", "LEFT-HAND", "righthanded". A word that names a side in
    another sense ("right now") counts too, since a picture that is not mirrored is never wrong.
    """
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", caption).lower())
    return any(SIDE.fullmatch(word) for word in words)
