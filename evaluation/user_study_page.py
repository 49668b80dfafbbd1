"""The page of a user study: one form, all in one HTML file but the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.cells import digest

STYLE = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 960px;
  font: 16px/1.5 system-ui, sans-serif; color: #1d2530; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; } .soft { color: #5c6773; } .bar { height: 6px; background: #e3e8ec; }
.bar div { height: 6px; background: #1f6f8b; } .row { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.row img { width: 160px; height: 160px; object-fit: contain; display: block; image-rendering: auto; }
button { font: inherit; } button.picture { position: relative; padding: 4px; border: 2px solid #cfd6dc;
  border-radius: 8px; background: #fff; cursor: pointer; } button.picture.ranked { border-color: #1f6f8b; }
button.picture span { position: absolute; top: -10px; left: -10px; min-width: 2rem; height: 2rem; border-radius: 1rem;
  background: #1f6f8b; color: #fff; font-weight: 700; line-height: 2rem; text-align: center; }
blockquote { margin: .75rem 0; padding: .5rem 1rem; border-left: 4px solid #1f6f8b; font-size: 1.15rem; }
button.go { padding: .6rem 1.4rem; border: 0; border-radius: 8px; background: #1f6f8b; color: #fff; cursor: pointer; }
button.go:disabled { background: #b7c0c8; cursor: default; } textarea { width: 100%; height: 8rem; }
"""
ASK = {
    "image": "Above are pictures of one thing. Which of the pictures below shows a thing most like it? Click them in "
    "order, the most similar first. Judge the thing alone, not the background.",
    "text": "Which of the pictures below fits this text best? Click them in order, the best first.",
}
SCRIPT = """
function begin() {
  const bytes = Array.from(crypto.getRandomValues(new Uint8Array(8)), byte => byte.toString(16).padStart(2, "0"));
  return {person: bytes.join(""), at: 0, answers: []};
}
function recall() { try { return JSON.parse(localStorage.getItem(slot)); } catch { return null; } }
// where storage is blocked the form works, but not beyond a reload
function keep() { try { localStorage.setItem(slot, JSON.stringify(state)); } catch { } }
let state = recall() || begin();
keep();
const main = document.querySelector("main");
let ranking = [], begun = Date.now();
function make(kind, options, ...children) {
  const element = Object.assign(document.createElement(kind), options);
  element.append(...children);
  return element;
}
function picture(name, label) { return make("img", {src: "pictures/" + name, alt: label}); }
function show() {
  main.replaceChildren();
  const done = make("div"); done.style.width = 100 * state.at / questions.length + "%";
  main.append(make("div", {className: "bar"}, done));
  if (state.at >= questions.length) return finish();
  const question = questions[state.at];
  ranking = []; begun = Date.now();
  main.append(make("p", {className: "soft"}, `Question ${state.at + 1} of ${questions.length}`));
  if (question.kind === "image") {
    main.append(make("div", {className: "row"}, ...question.references.map(name => picture(name, "reference"))));
  } else {
    main.append(make("blockquote", {}, question.text));
  }
  main.append(make("p", {}, ask[question.kind]));
  const next = make("button", {className: "go", id: "next", disabled: true, onclick: () => answer(question)}, "Next");
  const buttons = question.pictures.map((name, at) =>
    make("button", {className: "picture", title: "picture " + (at + 1)}, picture(name, "picture " + (at + 1))));
  const draw = () => buttons.forEach((button, at) => {
    const place = ranking.indexOf(question.pictures[at]);
    button.querySelector("span")?.remove();
    button.classList.toggle("ranked", place >= 0);
    if (place >= 0) button.append(make("span", {}, String(place + 1)));
    next.disabled = ranking.length < question.pictures.length;
  });
  buttons.forEach((button, at) => button.onclick = () => {
    const name = question.pictures[at];
    ranking = ranking.includes(name) ? ranking.slice(0, ranking.indexOf(name)) : [...ranking, name];
    draw();
  });
  main.append(make("div", {className: "row"}, ...buttons), next,
    make("p", {className: "soft"}, "Click a numbered picture to take back its number and all after it."));
}
function answer(question) {
  state.answers.push({question: question.id, ranking, seconds: Math.round((Date.now() - begun) / 100) / 10});
  state.at += 1;
  keep();
  show();
}
function again() {
  if (!confirm("The answers on this screen will be gone. Have they been saved?")) return;
  state = begin();
  keep();
  show();
}
function finish() {
  const text = JSON.stringify({form, person: state.person, answers: state.answers}, null, 1);
  const link = make("a", {href: URL.createObjectURL(new Blob([text], {type: "application/json"})),
    download: `${form}-${state.person.slice(0, 6)}.json`});
  main.append(make("h1", {}, "Thank you"), make("p", {}, "Please save your answers and send the file back."),
    make("button", {className: "go", id: "save", onclick: () => link.click()}, "Save answers"),
    make("p", {className: "soft"}, "If saving fails, copy this text instead:"),
    make("textarea", {id: "answers", readOnly: true, value: text}),
    make("p", {}, make("button", {id: "again", onclick: again}, "Start again for another person")));
}
show();
"""


def page(form: str, questions: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of a form; `questions` have id, kind, text, references and pictures (file names)."""
    constants = {
        "form": form,
        "questions": list(questions),
        "ask": ASK,
        "slot": f"study-{form}-{digest(list(questions))}",  # where the browser keeps an unfinished form
    }
    script = "".join(f"const {name} = {as_script(value)};\n" for name, value in constants.items()) + SCRIPT
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparing pictures</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Comparing pictures</h1>\n"
        "<main><noscript>This page needs JavaScript.</noscript></main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def as_script(value: Any) -> str:
    """A value as JavaScript in which nothing can end the script element or begin a comment of HTML."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
