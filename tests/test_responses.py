"""Texts that stand where a caption should, and captions that only look like them."""

import time

import pytest

from gazeguard.claims.parse import claims, parse
from gazeguard.filtering.writer import reason_category

REFUSALS = [
    "I'm sorry, I can't help with that.",
    "As an AI language model, I cannot see images.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I cannot describe this image.",
    "I'm unable to view images.",
    "Sorry, I can't do that.",
    "I apologize, but I am not able to process images.",
    "Unfortunately, I cannot provide a description of the image.",
    "I'm sorry.",
    "Please provide an image.",
    "It looks like you haven't uploaded an image.",
    "The image could not be loaded.",
    "I don't have the ability to see images.",
    "I am a language model and cannot view pictures.",
    "I can't identify people in images.",
    "Sorry, but as an AI assistant, I can't view the photo.",
    "Unable to process the image.",
    "I won't help with that.",
    "I must decline this request.",
    "There is no image attached.",
    "Sorry, but I can't see the image",
    "Hmm, I can't see anything.",
    "Thank you for the image, but I can't describe it.",
    "It seems there was an issue with the image upload. Please try again.",
    "Your request was rejected as a result of our safety system.",
]
PLACEHOLDERS = [
    "No image was provided.",
    "N/A",
    "null",
    "None",
    "n.a.",
    "[no caption]",
    "No description available",
    "untitled",
    "IMG_1234.jpg",
    "photo.png",
    "NaN",
    "TODO",
    "caption goes here",
    "Not available",
    "{caption}",
    "<caption>",
    "unknown",
    "undefined",
    "[deleted]",
    "[content filtered]",
    "[object Object]",
    "Ohne Titel",
    "\u4e0d\u660e",
    "Describe every panel of the picture in order.",
]
ERRORS = [
    "error: 429 Too Many Requests",
    "Error 429",
    "HTTP 503 Service Unavailable",
    "Traceback (most recent call last):\n  File",
    "RuntimeError: CUDA out of memory",
    "Internal Server Error",
    "Request timed out.",
    "Rate limit exceeded, retry after 20s",
    '{"error": {"message": "x"}}',
    "429 Too Many Requests",
    "CUDA out of memory. Tried to",
    "404 Not Found",
    "<html><body>502 Bad Gateway",
    "Error code: 500 - {'error'",
    "An error occurred while processing",
    "failed to load image",
    "ValueError('x')",
    "[ERROR] timeout",
    "ERROR",
    "[WARN] model timeout",
    "openai.APITimeoutError",
    "ConnectionError",
    "FAILED",
    "upstream connect error or disconnect/reset before headers",
    "The model is currently overloaded. Please try again later.",
    "Oops! Something went wrong",
    "There was an error generating the response.",
    "Fehler: Zeit\u00fcberschreitung",
]
SPECIAL = [
    "<|endoftext|>",
    "</s>",
    "<pad><pad>",
    "[UNK] [UNK]",
    "<|im_end|>\n<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<unk>",
    "<start_of_image>",
    "<|im_start|>assistant",
    "ASSISTANT:",
    "### Response:",
    "USER: <image> Describe the image. ASSISTANT:",
]
CAPTIONS = [
    "A red star.",
    "There is no image of a dog on the wall.",
    "A man is unable to open the door.",
    "No people are in the photo.",
    "An error message on a screen.",
    "A sign reads 'error: 404 not found'.",
    "A photo of a null sign",
    "Two people; I can see a dog.",
    "In panel one there is a red star.",
    "A text on a wall.",
    "The image is not clear but a dog is visible.",
    "No dogs. The picture shows a cat.",
    "You can see a dog.",
    "We see a boat.",
    "Error sign on the wall.",
    "Please do not touch sign on a wall.",
    "Can of soup.",
    "An error.",
    "Terror.",
    "Answer: a red star.",
    "A removed sticker.",
    "Unfortunately, the red star is not there.",
    "The model is wearing a red scarf.",
    "The server is busy carrying a tray.",
    "The system is down the hill near a house.",
    "It looks like a red star.",
    "Failed harvest in a green field.",
    "The man cannot see the dog.",
]
LONG = [
    "a ",
    "i ",
    "sorry ",
    "error ",
    "<|",
    "i can't ",
    "no image ",
    "as an a-a ",
    "_",
    "img 1",
    "[",
    "\n",
    "{",
    "<pad> ",
    "w.",
    "thank you for ",
    "it seems the image ",
    "the model is ",
    "user: ",
    "oops ",
]


@pytest.mark.parametrize(
    ("text", "response"),
    [
        *((text, "refusal") for text in REFUSALS),
        *((text, "placeholder") for text in PLACEHOLDERS),
        *((text, "error text") for text in ERRORS),
        *((text, "special token") for text in SPECIAL),
        ("I'm sorry, but I can't help with that. Please let me know if you need anything else.", "refusal"),
        (" null\n", "placeholder"),
    ],
)
def test_what_is_no_caption_is_named(text, response):
    parsed = parse(text)
    assert (parsed.response, parsed.reason, parsed.claims) == (response, response, ())
    assert "".join(part.text for part in parsed.parts) == text


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_stay_captions(text):
    assert parse(text).response is None


def test_a_refusal_beside_a_statement_is_no_whole_refusal():
    parsed = parse("I'm sorry, I can't identify people. There is a red star.")
    assert parsed.response is None
    assert [phrase.text for phrase in parsed.objects] == ["a red star"]
    assert {part.kind for part in parsed.parts} == {"refusal", "statement"}
    seen = parse("I can't see a face, but there is a red star.")
    assert seen.response is None


def test_the_filter_counts_each_response_as_such():
    assert reason_category("error text: the text is no caption") == "error text"


@pytest.mark.parametrize("text", LONG)
def test_any_long_text_is_read_in_linear_time(text):
    """Patterns are bounded: what looks like the beginning of a response ten thousand times costs no more than words do."""
    from gazeguard.claims.responses import refusals, whole_response

    begin = time.process_time()
    whole_response(text * 5000)
    list(refusals(text * 5000))
    assert time.process_time() - begin < 1


def test_what_the_model_says_it_can_see_is_judged():
    """ "I can see" states what is in the image; "I can describe" is an offer."""
    assert [str(claim) for claim in claims("I can see a crab. I can also see a cup.")] == ["a crab", "a cup"]
    assert claims("I can describe a crab.") == []
