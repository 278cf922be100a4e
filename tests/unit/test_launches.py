"""XLA's list of what a compiled program launches, read: loops, conditionals and graphs."""

import pytest

from benchmarks import launches
from benchmarks.launches import Launch, Launches

PLANNED = """\
000: kCopy         [source | next=001 (1)] kCopy
001: kWhile        [prev=000 (1) | sink        ]
condition:
    002: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    003: kCustomKernel [source        | next=006 (1)] gemm_fusion_dot_1 grid: [256, 1, 1] threads: [64, 1, 1]
    004: kCustomCall   [prev=003 (1)  | next=005 (1)] kCustomCall
    009: kConditional  [prev=004 (1)  | next=010 (1)]
      false_branch:
        005: kWhile        [prev=004 (1) | sink]
condition:
            006: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
          body:
            007: kCustomKernel [source | sink] input_reduce_fusion grid: [1, 1, 1] threads: [1, 1, 1]
      true_branch:
        008: kCopy [source | sink] kCopy
    010: kCustomKernel [prev=009 (1)  | sink        ] input_reduce_fusion_2 grid: [1, 1, 1] threads: [2, 1, 1]
"""
FINAL = PLANNED.replace("    003: kCustomKernel", "    000: kCommandBuffer [source | sink]\n        003: kCustomKernel")
METADATA = """\
thunk_metadata { thunk_info { profile_annotation: "while.1" thunk_id: 1 } thunk_kind: "kWhile" }
thunk_metadata { thunk_info { profile_annotation: "fusion.3" thunk_id: 3 } thunk_kind: "kCustomKernel" }
thunk_metadata { thunk_info { profile_annotation: "mpmd_map.2" thunk_id: 4 } thunk_kind: "kCustomCall" }
"""
COMPILED = """\
%fused_3 (p: f32[4]) -> f32[4] {
  ROOT %dot = f32[4] multiply(%p, %p), metadata={op_name="jit(decode)/while/body/layer_1/attention/dot_general"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %fusion.3 = f32[4] fusion(%p), kind=kCustom, calls=%fused_3
  %mpmd_map.2 = f32[4] custom-call(%fusion.3), metadata={op_name="jit(decode)/layer_1/experts/jit(mlp)/down/mpmd_map"}
}
"""


def _dump(folder, planned: str = PLANNED, final: str = FINAL) -> Launches:
    for name, text in (("", planned), ("_after_thunk_passes", final)):
        (folder / f"module_1.jit_decode.thunk_sequence{name}.txt").write_text(text)
    (folder / "module_1.jit_decode.thunk_metadata.txt").write_text(METADATA)
    return launches.of_folder(folder, COMPILED)


def test_a_token_counts_the_cheapest_branch_and_its_condition(tmp_path):
    """Guards the count that `make gates` bounds: a loop's condition counts, and of two branches the cheaper."""
    found = _dump(tmp_path)
    assert found.launches == [
        Launch("elementwise", "loop_and_fusion", None, ""),
        Launch("product", "gemm_fusion_dot_1", 1, "attention/dot_general"),
        Launch("Mosaic", "down", 1, "mlp"),
        Launch("copy", "kCopy", None, ""),
        Launch("reduction", "input_reduce_fusion_2", None, ""),
    ]


def test_the_host_waits_for_conditions_outside_graphs(tmp_path):
    """Guards the count of waits: one for the loop, one for each conditional that is in no graph."""
    assert _dump(tmp_path)[1:] == (2, 5)
    lines = FINAL.splitlines()
    whole = [lines[0], "001: kCommandBuffer [source | sink]", *("    " + line for line in lines[1:])]
    assert _dump(tmp_path, final="\n".join(whole))[1:] == (0, 0)


def test_two_depths_give_what_a_layer_adds():
    """Guards the two sums against each other: four layers have twice what two have, and the rest once."""
    once, layer = Launch("copy", "a", None, ""), Launch("product", "b", 0, "")
    two, four = (Launches([once] + [layer] * n, 0, 0) for n in (2, 4))
    assert launches.by_depth(two, 2, four, 4) == {
        "copy": {"per_layer": 0, "beside_layers": 1},
        "product": {"per_layer": 1, "beside_layers": 0},
    }


def test_a_folder_without_a_list_is_refused(tmp_path):
    """Guards against a count of nothing where XLA dumps no list, or another's."""
    with pytest.raises(ValueError, match="holds 0 lists thunk_sequence with a loop"):
        launches.of_folder(tmp_path, COMPILED)
