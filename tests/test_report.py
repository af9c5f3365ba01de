"""The report command, on pico conversions."""

import json

import pytest

from mha2mla.cli.main import main


@pytest.fixture
def conversions(save_source, calibration_file, tmp_path):
    source = save_source("gqa")
    text = ("--calibration-data", calibration_file, "--calibration-samples", 4, "--calibration-length", 16)
    for name, options in (
        ("big", ("--cache-ratio", 0.5, "--refine-steps", 1)),
        ("small", ("--cache-ratio", 0.3, "--refine-steps", 1)),
        ("paper", ("--cache-ratio", 0.5, "--preset", "paper")),
    ):
        assert main(["convert", *map(str, (source, tmp_path / name, *options, *text))]) == 0
    return tmp_path


def test_report_is_one_self_contained_page_with_pictures(conversions, calibration_file, capsys):
    folders = [str(conversions / name) for name in ("big", "small", "paper")]
    arguments = ["report", *folders, "--data", str(calibration_file), "--blocks", "2", "--length", "16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("original", "big", "small", "paper"):
        assert f"{name}: " in printed
    big = conversions / "big"
    page = (big / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.split("<h2>Options")[0]  # nothing is fetched
    for picture in ("perplexity.png", "rope_frequencies.png", "latent_energy.png", "loss_by_stage.png"):
        assert (big / picture).read_bytes().startswith(b"\x89PNG")
    assert (big / "README.md").read_text().count("](perplexity.png)") == 1
    main(arguments)
    assert (big / "README.md").read_text().count("](perplexity.png)") == 1

    # The paper's preset measures nothing by layer: two pictures.
    assert main(["report", folders[2], *arguments[4:]]) == 0
    assert (conversions / "paper" / "report.html").read_text().count("data:image/png;base64,") == 2


def test_report_wants_a_conversion(tmp_path, calibration_file, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main(["report", str(tmp_path), "--data", str(calibration_file)]) == 2
    assert "give a folder that `mha2mla convert` wrote" in capsys.readouterr().err
