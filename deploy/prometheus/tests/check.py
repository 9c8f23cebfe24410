"""Checks the alerts with promtool: that they are valid, that each fires when it should with the text that it should have, and not just below, and
which of them fire on the recorded incidents.

  check.py             all of that
  check.py --update    writes down anew what fires on the recorded incidents"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ALERTS = HERE.parent / "alerts.yml"
RECORDED = HERE / "recorded"
# Who is meant, of the labels of an alert.
WHO = ("reconciler", "subscriber", "kind", "category", "stream", "instance")
FIRING = f'group by (alertname, {", ".join(WHO)}) (ALERTS{{alertstate="firing"}})'


def metrics_of_alerts():
    names = set(re.findall(r"aftercommit_\w+", re.sub(r"(?m)^ *(summary|description|runbook|#).*$", "", ALERTS.read_text())))
    return names | {"up"}


def promtool(*arguments):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def quoted(text):
    return json.dumps(text, ensure_ascii=False)


def word(value):
    """A value as promtool reads it. Above ten a fraction says nothing."""
    if value is None or isinstance(value, str):
        return value or "_"
    if value != value:
        return "NaN"
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1g}"


def encode(values):
    """As promtool reads them: what stays, or grows by the same each time, is written once."""
    words, index, texts = [], 0, [word(value) for value in values]
    numbers = [int(text) if text.isdigit() else None for text in texts]
    while index < len(texts):
        text, end = texts[index], index + 1
        while end < len(texts) and texts[end] == text:
            end += 1
        if text == "_":
            words.append(f"_x{end - index}" if end - index > 1 else "_")
            index = end
            continue
        grows = 0
        if end - index == 1 and numbers[index] is not None and end < len(texts) and numbers[end] is not None:
            grows = numbers[end] - numbers[index]
            while end < len(texts) and numbers[end] is not None and numbers[end] - numbers[end - 1] == grows:
                end += 1
        if end - index < 3 or numbers[index] is None:
            end = end if not grows else index + 1
            words += [text] * (end - index)
        else:
            words.append(f"{text}{grows:+}x{end - index - 1}")
        index = end
    return " ".join(words)


def decode(text):
    """The other way."""
    values = []
    for one in text.split():
        if found := re.fullmatch(r"_x(\d+)", one):
            values += [None] * int(found[1])
        elif found := re.fullmatch(r"(-?[\d.]+)([+-]\d+)x(\d+)", one):
            values += [float(found[1]) + int(found[2]) * step for step in range(int(found[3]) + 1)]
        elif one in ("_", "stale"):
            values.append(None if one == "_" else one)
        else:
            values.append(float(one))
    return values


class Recorded:
    """A recorded incident: its series, and what fires when."""

    def __init__(self, path, about="", notes=(), series=None, expected=(), step=15, steps=0):
        self.path, self.about, self.notes, self.series = path, about, list(notes), series or {}
        self.expected, self.step, self.steps, self.firing = set(expected), step, steps, {}

    @classmethod
    def read(cls, path):
        """Of what `text` has written."""
        one, about = cls(path), []
        for line in path.read_text().splitlines():
            if found := re.fullmatch(r"# +(\d+(?:\.\d+)?)m +(.*)", line):
                one.notes.append((round(float(found[1]) * 60 / one.step), found[2]))
            elif found := re.fullmatch(r"# It fires: (.*)", line):
                one.expected = {tuple(word.split(":", 1)) for word in found[1].split()}
            elif found := re.fullmatch(r"# Steps: (\d+)", line):
                one.steps = int(found[1])
            elif line.startswith("# ") and not one.notes and not one.expected:
                about.append(line[2:])
            elif found := re.fullmatch(r"      - \{series: '(.*)', values: '(.*)'\}", line):
                one.series[found[1]] = found[2]
        one.about = about[0] if about else ""
        return one

    def text(self):
        lines = [f"# {self.about}", "# `scripts/alerts --record` has written this file, and `scripts/alerts --update` what fires when.",
                 f"# Steps: {self.steps}", f"# It fires: {' '.join(sorted(':'.join(pair) for pair in self.expected))}", "#"]
        lines += [f"# {step * self.step / 60:6.2f}m  {text}" for step, text in self.notes]
        lines += ["rule_files: [../../alerts.yml]", f"evaluation_interval: {self.step}s", "tests:", f"  - interval: {self.step}s", "    input_series:"]
        lines += [f"      - {{series: '{name}', values: '{values}'}}" for name, values in sorted(self.series.items())]
        lines.append("    promql_expr_test:")
        for minute in self.minutes():
            lines.append(f"      - expr: {FIRING}")
            lines.append(f"        eval_time: {minute}m")
            firing = self.firing.get(minute, [])
            if firing:
                lines.append("        exp_samples:")
                lines += [f"          - {{labels: '{labels}', value: 1}}" for labels in firing]
        return "\n".join(lines) + "\n"

    def minutes(self):
        return range(1, self.steps * self.step // 60)

    def play(self):
        """Which alerts fire at each minute: promtool says it when it was told that there are none."""
        self.firing = {}
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".yml") as file:
            file.write(self.text())
            file.flush()
            ok, said = promtool("test", "rules", file.name)
        if not ok and "exp:" not in said:
            sys.exit(f"{self.path.name}: {said[:2000]}")
        for minute, got in re.findall(r'time: (\w+),\s+exp:\s*(?:"nil"|\S*)\s+got:\s*"?(.*?)(?:"?\n\n|"?\n?$|"?(?=\n\s+expr:))', said, re.S):
            labels = [label.replace('\\"', '"') for label in re.findall(r"(\{(?:[^{}])*\}) 1E\+00", got)]
            self.firing[minutes_of(minute)] = sorted(labels)
        return self

    def fired(self):
        found = set()
        for labels in (labels for all_labels in self.firing.values() for labels in all_labels):
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found.add((pairs["alertname"], next(pairs[name] for name in WHO if name in pairs)))
        return found

    def problems(self):
        """What fires and should not, and the other way round; in the end nothing does."""
        name, found = self.path.name, self.fired()
        all_of = [f"{name}: {alert} of {who} does not fire" for alert, who in sorted(self.expected - found)]
        all_of += [f"{name}: {alert} of {who} fires, and nothing is wrong there" for alert, who in sorted(found - self.expected)]
        last = max(self.minutes())
        return all_of + [f"{name}: {labels} still fires in the end" for labels in self.firing.get(last, [])]


def minutes_of(duration):
    units = {"h": 60, "m": 1, "s": 1 / 60}
    return round(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration)))


def write(name, about, system, expected, step):
    """What was recorded, with what fires."""
    RECORDED.mkdir(exist_ok=True)
    series = {}
    for labels, values in system.series.items():
        present = [value for value in values if isinstance(value, float)]
        # A bucket in which nothing ever was says nothing.
        if present and not (any(present) is False and "_bucket{" in labels):
            series[labels] = encode(values)
    one = Recorded(RECORDED / f"{name}.yml", about, system.notes, series, expected, step, system.step).play()
    one.path.write_text(one.text())
    for problem in one.problems():
        print(problem, flush=True)


def recorded(update):
    problems = []
    for path in sorted(RECORDED.glob("*.yml")):
        one = Recorded.read(path)
        if update:
            path.write_text(one.play().text())
            problems += one.problems()
        ok, said = promtool("test", "rules", str(path))
        if not ok:
            problems.append(f"{path.name}: {said[:3000]}")
    return problems


def queries():
    """Those of the dashboards, as promtool reads rules."""
    sys.path.insert(0, str(HERE.parents[1] / "grafana"))
    import dashboards
    all_of = list(dashboards.expressions())
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump({"groups": [{"name": "queries", "rules": [{"record": "query", "expr": text, "labels": {"at": f"{name}: {title} {index}"}}
                                                            for index, (name, title, text) in enumerate(all_of)]}]}, file)
        file.flush()
        ok, said = promtool("check", "rules", file.name)
    return len(all_of), [] if ok else [said]


def main():
    import cases
    update = "--update" in sys.argv[1:]
    ok, said = promtool("check", "rules", str(ALERTS))
    problems = [] if ok else [said]
    problems += cases.problems()
    count, wrong = queries()
    problems += wrong
    problems += recorded(update)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(cases.alerts())} alerts fire when they should and not just below; {len(list(RECORDED.glob('*.yml')))} recorded incidents fire what they fired; "
          f"{count} queries of dashboards are valid")


if __name__ == "__main__":
    main()
