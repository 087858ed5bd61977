#!/usr/bin/env python3
"""How often the first citation of a right answer is the sentence that has it, for questions about prose: measure_citations.py QUARRY MODEL [POLICY]

The documents are excerpts of the GPL (/usr/share/common-licenses/GPL-3) and of the novels that scripts/fetch-documents.sh fetches. An answer is right if one
of the words is in it; a citation is right if one of the phrases is."""
import json
import pathlib
import re
import subprocess
import sys

N_BYTES = 6000
GPL = "/usr/share/common-licenses/GPL-3"
NOVELS = subprocess.run([pathlib.Path(__file__).parent / "fetch-documents.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
# file, where the excerpt begins: (question, words of a right answer, phrases of the sentence)
QUESTIONS = {
    (GPL, "How to Apply These Terms"): [
        ("Which command shows the warranty?", ["show w"], ["show w"]),
        ("What should the interactive mode output when it starts?", ["notice", "program"], ["starts in an interactive mode", "comes with ABSOLUTELY NO WARRANTY"]),
        ("Where can a copy of the license be found on the web?", ["gnu.org"], ["gnu.org/licenses"]),
        ("Which license should be used instead if the program is a subroutine library?", ["lesser", "LGPL"], ["Lesser"]),
    ],
    (GPL, "0. Definitions"): [
        ("How is each licensee addressed?", ["you"], ["addressed as \"you\""]),
        ("What does \"The Program\" refer to?", ["copyrightable work"], ["\"The Program\" refers"]),
        ("What does \"object code\" mean?", ["non-source"], ["\"Object code\" means"]),
        ("What is the \"source code\" for a work?", ["preferred form", "preferred"], ["preferred form"]),
    ],
    (GPL, "6. Conveying Non-Source"): [
        ("For how many years must the written offer be valid?", ["three", "3"], ["three years"]),
        ("What is a \"User Product\"?", ["consumer", "personal"], ["\"User Product\" is", "consumer product"]),
    ],
    (GPL, "8. Termination"): [
        ("How many days after receipt of the notice may the violation be cured?", ["30", "thirty"], ["30 days"]),
        ("How many days after the cessation can the copyright holder notify the violation?", ["60", "sixty"], ["60 days"]),
        ("What is an \"entity transaction\"?", ["transferring", "transfer"], ["\"entity transaction\" is"]),
    ],
    ("emma.txt", "Emma Woodhouse, handsome"): [
        ("How old was Emma Woodhouse?", ["twenty", "21"], ["twenty-one"]),
        ("Who was Miss Taylor?", ["governess"], ["governess"]),
        ("How many miles is London from Highbury?", ["sixteen", "16"], ["sixteen miles"]),
    ],
    ("persuasion.txt", "Sir Walter Elliot, of Kellynch"): [
        ("Where did Sir Walter Elliot live?", ["Kellynch"], ["Kellynch Hall"]),
        ("When was Walter Elliot born?", ["1760"], ["1760"]),
        ("What book did Sir Walter Elliot read for his own amusement?", ["Baronetage"], ["Baronetage"]),
        ("In which year was Anne born?", ["1787"], ["1787"]),
    ],
    ("pride-and-prejudice.txt", "It is a truth universally"): [
        ("Who has taken Netherfield Park?", ["Bingley", "young man"], ["Netherfield"]),
        ("How many thousand pounds a year does Mr. Bingley have?", ["four", "five"], ["four or five thousand"]),
        ("How did Mr. Bingley come to see Netherfield?", ["chaise"], ["chaise and four"]),
    ],
    ("sense-and-sensibility.txt", "The family of Dashwood"): [
        ("Where was the residence of the Dashwood family?", ["Norland"], ["Norland Park"]),
        ("In which county was the family of Dashwood settled?", ["Sussex"], ["Sussex"]),
        ("How many daughters did Mr. Henry Dashwood have by his present lady?", ["three"], ["three daughters"]),
    ],
    ("northanger-abbey.txt", "No one who had ever seen Catherine"): [
        ("What was the name of the father of Catherine Morland?", ["Richard"], ["Richard"]),
        ("How many children were in the family of Catherine Morland?", ["ten", "10"], ["ten children"]),
        ("Which instrument did Catherine learn to play?", ["spinnet", "music"], ["spinnet", "learn music"]),
    ],
    ("mansfield-park.txt", "About thirty years ago"): [
        ("Whom did Miss Maria Ward of Huntingdon captivate?", ["Bertram"], ["Sir Thomas Bertram"]),
        ("How many pounds did Miss Maria Ward have?", ["seven thousand", "7,000", "7000"], ["seven thousand pounds"]),
        ("Whom did Miss Frances marry?", ["lieutenant"], ["Lieutenant", "Miss Frances"]),
    ],
}


def flat(text):
    return re.sub(r"\s+", " ", text).lower()


def excerpt(name, start):
    text = (pathlib.Path(NOVELS) / name).read_text()
    at = min(text.index(start), len(text) - N_BYTES)
    return text[at : at + N_BYTES]


def main(quarry, model, attn="ivfpq"):
    asked = right = first = listed = 0
    for (name, start), questions in QUESTIONS.items():
        document = excerpt(name, start)
        for question, words, phrases in questions:
            command = [quarry, "ask", "-m", model, "--no-store", "--json", "--attn", attn, "--cite=3", "-n", "40", "--doc", "-", question]
            result = json.loads(subprocess.run(command, input=document, stdout=subprocess.PIPE, text=True, check=True).stdout)
            correct = any(flat(w) in flat(result["answer"]) for w in words)
            holds = [any(flat(p) in flat(c["text"]) for p in phrases) for c in result["citations"]]
            asked += 1
            right += correct
            first += correct and holds[:1] == [True]
            listed += correct and any(holds)
            print("right" if correct else "wrong", "".join("+" if h else "-" for h in holds), question, "|", flat(result["answer"]), flush=True)
    print(f"{attn}: {right} of {asked} answers are right; of these {first} cite the sentence first, {listed} among the first three")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if 3 <= len(sys.argv) <= 4 else __doc__)
