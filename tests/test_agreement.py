"""Two evaluations of the same users, paired (studies/agreement.py)."""

import json

import pytest

from studies.agreement import agreement_text, main


def record(user: int, logps: list[float], hit: bool = True, valid: bool = True) -> dict:
    """Three titles, of which the first is the target."""
    facts = {"user": str(user), "target": "a", "candidates": ["a", "b", "c"], "target_slot": 0}
    return facts | {"logps": logps, "hit": hit, "valid": valid}


def test_two_folders_are_compared_user_by_user(tmp_path, monkeypatch, capsys):
    before = [record(u, [-1.0, -2.0, -3.0]) for u in range(4)]
    after = [before[0], record(1, [-1.5, -2.5, -3.5]), record(2, [-3.0, -2.0, -1.0], hit=False)]
    after.append(before[3] | {"hit": False, "valid": False})
    for name, records in (("first", before), ("second", after)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(r) + "\n" for r in records)
        (tmp_path / name / "predictions.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["agreement", f"{tmp_path}/first", f"{tmp_path}/second"])
    main()
    text = capsys.readouterr().out
    for line in (
        "| HR@1 written | 1.000 | 0.500 | -0.5000 [-1.000, +0.000] |",
        "| ValidRatio | 1.000 | 0.750 | -0.2500 [-0.750, +0.000] |",
        "| HR@1 ranked first | 1.000 | 0.750 | -0.2500 [-0.750, +0.000] |",
        # changes: 0; -.5 each; -2, 0, 2; 0. Up to 3 of 4 draws are the third user: 2 ** .5
        "root mean square 0.8539 [0.000, 1.414]",
        "mean -0.1250 [-0.375, 0.000]",
        "same title first in 0.7500 [0.250, 1.000] of the lists",
    ):
        assert line in text, line
    for other in ([r | {"user": "x" + r["user"]} for r in before], before[:-1]):
        with pytest.raises(ValueError, match="of different users"):
            agreement_text(before, other)
