"""The README promises nothing that no test keeps."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADING = "## What moebench promises when things go wrong"
SWEEP, AHEAD, RESUME, JOURNAL, HOSTILE = "test_sweep", "test_ahead", "test_resume", "test_journal", "test_hostile_input"
PROMISES = {  # sentence -> (module, test), ...
    "A kernel that fails, crashes, hangs or poisons its CUDA context costs one row, and the next row runs in a fresh process.": [
        (SWEEP, "test_twelve_faults_in_sixty_cases_are_twelve_bad_rows"),
        (SWEEP, "test_after_an_abnormal_end_the_next_case_runs_in_a_new_process"),
    ],
    "A worker that stays silent past the deadline of its phase (`--deadline PHASE=SECONDS`) is stopped, "
    "and its row names the phase and the line it was in.": [
        (SWEEP, "test_twelve_faults_in_sixty_cases_are_twelve_bad_rows"),
        (SWEEP, "test_the_stack_of_a_hang_is_in_its_log"),
        (SWEEP, "test_a_compiler_that_does_not_end_is_a_compile_timeout_of_all_that_need_it"),
    ],
    "No process outlives a sweep, not even one that ignores SIGTERM; a worker dies with a supervisor that is killed.": [
        (SWEEP, "test_no_process_outlives_a_sweep_not_even_one_that_ignores_sigterm"),
        (SWEEP, "test_a_worker_dies_with_a_supervisor_that_is_killed"),
        (AHEAD, "test_one_that_waits_dies_with_a_supervisor_that_is_killed"),
        (AHEAD, "test_a_run_that_is_left_early_leaves_nobody_waiting"),
    ],
    "After an abnormal end the device gets its next case only once a fresh process has found it well; "
    "after three failed probes, or twelve workers that ended so without an ok row between them, it is quarantined, "
    "and the rows that are left say so.": [
        (SWEEP, "test_a_device_on_which_nothing_starts_any_more_is_quarantined"),
        (AHEAD, "test_a_device_on_which_only_deaths_follow_each_other_is_quarantined_and_nobody_goes_on_waiting"),
    ],
    "The command itself never imports torch and never owns a CUDA context.": [
        (SWEEP, "test_the_supervisor_never_imports_torch"),
    ],
    "A record is on disk, behind a checksum, before the next point starts: "
    "killing moebench at any moment and resuming loses none and does none twice.": [
        (RESUME, "test_killing_the_supervisor_loses_nothing_and_repeats_nothing"),
        (JOURNAL, "test_every_bit_of_a_line_counts"),
    ],
    "`--resume` does what is missing, tries once more what crashed, hung or failed, and leaves results alone.": [
        (RESUME, "test_resume_does_only_what_is_missing"),
        (RESUME, "test_what_failed_is_tried_once_more_and_what_is_wrong_is_not"),
        (JOURNAL, "test_results_are_settled_and_failures_once_retried"),
    ],
    "One process writes a run; a second one is refused and told which has it.": [
        (SWEEP, "test_a_second_process_on_a_run_is_refused_and_told_who_has_it"),
    ],
    "A full disk ends the run with exit code 5; what was written before is intact, and what was measured is printed.": [
        (RESUME, "test_a_full_disk_ends_the_run_with_5_and_what_was_measured_is_printed"),
    ],
    "`moebench fsck RUN` names the line, the byte and the reason of whatever is wrong with a run.": [
        (JOURNAL, "test_fsck_names_line_byte_and_reason_of_all_that_is_wrong"),
    ],
    "Runs of every schema so far can be read; a newer major is refused with the version that is needed.": [
        (JOURNAL, "test_runs_of_every_schema_so_far_are_read"),
        (JOURNAL, "test_an_unreadable_line_is_named"),
    ],
    "Only a row whose output was right has a time.": [
        (SWEEP, "test_each_fault_ends_as_its_own_status_and_harms_no_other"),
    ],
    "Every point is launched up to 300 times (`--repeat-check`) and every output compared, as far as about 0.4 s allow; "
    "`moebench soak BACKEND` does it for minutes.": [
        (SWEEP, "test_each_fault_ends_as_its_own_status_and_harms_no_other"),
        (SWEEP, "test_a_soak_counts_launches_and_those_that_differ"),
        ("test_repeat_check", "test_one_bad_launch_among_300_is_found"),
        ("test_repeat_check", "test_as_many_launches_are_compared_as_fit_and_one_at_least"),
    ],
    "Ctrl-C finishes the point in progress, or gives it up after 30 s, and prints the command that goes on; a second one stops at once.": [
        (SWEEP, "test_interrupting_finishes_the_point_in_progress_and_prints_how_to_go_on"),
        (SWEEP, "test_a_point_that_does_not_end_after_an_interrupt_is_given_up"),
        (SWEEP, "test_a_second_interrupt_stops_at_once"),
    ],
    "Plans, journals and traces are data: none of them is ever run, and a strange one is refused in words.": [
        (HOSTILE, "test_a_plan_is_points_or_sentences"),
        (HOSTILE, "test_a_damaged_journal_is_an_error_that_names_the_place"),
        (HOSTILE, "test_a_trace_is_read_or_refused_with_its_line"),
        ("test_architecture", "test_nothing_loads_pickles_or_evaluates_text"),
    ],
    "What they say cannot steer a terminal or become a formula of a spreadsheet.": [
        (HOSTILE, "test_control_characters_in_a_journal_do_not_reach_the_terminal"),
        (HOSTILE, "test_a_csv_cell_never_begins_a_formula"),
    ],
    "A plug-in is imported in a worker, and only when it is named.": [
        (HOSTILE, "test_a_plugin_is_imported_in_a_worker_only_and_only_when_it_is_named"),
    ],
    "A worker gets no environment variable whose name says that it is a token, a password, a key or another secret.": [
        (AHEAD, "test_what_is_secret_by_its_name_is_not_given_to_children"),
    ],
}


def functions_of(module):
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_readme_makes_these_promises_and_no_others():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    told = [" ".join(item.split()) for item in re.split(r"^- ", section, flags=re.MULTILINE)[1:]]
    assert told == list(PROMISES)


@pytest.mark.parametrize("sentence", PROMISES)
def test_each_promise_has_its_tests(sentence):
    assert PROMISES[sentence]
    for module, test in PROMISES[sentence]:
        assert test in functions_of(module)
