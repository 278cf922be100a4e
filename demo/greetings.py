"""Greetings, thanks and farewells."""

from random import Random

from demo.question import Question, is_held_out, thinking

HELLO = "Hello! What can I do for you?"
KINDS = {  # answer -> what people say
    HELLO: "Hello|Hi|Hey|Good morning|Good evening|Good day|Greetings|Hello there|Hi there|Hey there",
    "I am well, thank you. What can I do for you?": "How are you|How are you doing|How do you do|How is it going",
    "You are welcome!": "Thank you|Thanks|Many thanks|Thank you very much|Thanks a lot|Great, thanks",
    "Goodbye!": "Bye|Goodbye|See you|Good night|See you later|Bye bye|That is all",
    "Yes, I am here.": "Are you there|Are you still there|Can you hear me",
    "I am glad.": "Well done|Great|Very good|Nice|That is right|Good answer",
}
ENDINGS = ("", ".", "!", ", demo model!", " :)", ", my friend!")


def greeting(random: Random, held_out: bool) -> Question:
    """Something that is said in courtesy; a text with an ending is held out, or is not."""
    while True:
        answer = random.choice(list(KINDS))
        said, ending = random.choice(KINDS[answer].split("|")), random.choice(ENDINGS)
        if (ending not in ("", "!") and is_held_out("greeting", said, ending)) == held_out:
            break
    return Question("greeting", said + ending, answer, None, thinking("This is courtesy.", "Courtesy."))
