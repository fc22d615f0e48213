# SPDX-License-Identifier: BSD-3-Clause
"""The tests that show what the libvfio-user engine cannot do: expected to fail, strictly.

By the names of `server/engines/libvfio_user_limits.py`: every row there has tests here, or is shown
elsewhere (`ELSEWHERE`).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from needs import missing
from vfio_user.client.qemu.libvfio import LIBRARY
from vfio_user.client.qemu.paths import lab_root
from vfio_user.server.engines.libvfio_user_abi import EVERY, V2_ONLY, Abi
from vfio_user.server.engines.libvfio_user_library import Library, LibraryError, find_library
from vfio_user.server.engines.libvfio_user_limits import LIMITS, V1_ONLY


@dataclass(frozen=True, slots=True)
class Fails:
    """A test function (`MODULE::` before it where two have the name); of its cases those with the ids in
    `cases`, or all but those in `good`. `spoils`: the server hangs then, has ended, or has leaked."""

    test: str
    cases: tuple[str, ...] = ()
    abis: frozenset[Abi] = EVERY
    good: tuple[str, ...] = ()
    spoils: bool = False

    def covers(self, module: str, test: str, case: str, abi: Abi) -> bool:
        chosen = case in self.cases if self.cases else case not in self.good
        return self._is(module, test) and chosen and abi in self.abis

    def ids(self, module: str, test: str) -> tuple[str, ...]:
        return (*self.cases, *self.good) if self._is(module, test) else ()

    def _is(self, module: str, test: str) -> bool:
        return self.test in (test, f"{module}::{test}")


@dataclass(frozen=True, slots=True)
class ModuleFails:
    """All tests of a module, but those in `good`: there by name the cases that pass."""

    module: str
    abis: frozenset[Abi]
    good: Mapping[str, tuple[str, ...]]
    spoils = False

    def covers(self, module: str, test: str, case: str, abi: Abi) -> bool:
        return module == self.module and abi in self.abis and case not in self.good.get(test, ())

    def ids(self, module: str, test: str) -> tuple[str, ...]:
        return self.good.get(test, ()) if module == self.module else ()


@dataclass(frozen=True, slots=True)
class Expected:
    """What a case fails by: a row's name and effect."""

    reason: str
    spoils: bool


def _numbers(*span: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(*span))


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{one}-{other}" for one in first for other in second)


def _methods(which: str, features: str) -> tuple[str, ...]:
    return tuple(f"methods{which}-{feature}" for feature in features)


EXPECTED: Mapping[str, tuple[Fails | ModuleFails, ...]] = {
    "framing": (
        Fails("test_a_message_may_come_byte_by_byte"),
        Fails("test_a_message_may_come_in_two_parts", ("1", "8", "15", "17", "31", "32", "33", "35")),
        Fails("test_messages_that_are_cut_anywhere_are_joined_again"),
        Fails("test_a_megabyte_goes_in_one_message_each_way"),
        Fails("test_more_than_max_data_xfer_size_is_refused_and_nothing_is_lost", abis=V2_ONLY),
    ),
    "refused header": (
        Fails("test_a_message_type_that_does_not_exist_is_refused"),
        Fails("test_a_huge_message_that_is_refused_does_not_disturb_the_next_one"),
        Fails("test_a_size_that_cannot_be_ends_the_connection"),
        Fails("test_what_came_before_a_broken_header_is_answered"),
        Fails("test_the_next_client_is_welcome_after_a_broken_header"),
        Fails("test_who_sends_a_broken_header_without_reading_is_dropped_once_it_reads"),
        Fails("test_descriptors_before_a_broken_header_are_closed"),
    ),
    "error replies": (Fails("test_the_reply_to_an_access_that_fails_is_the_header_alone"),),
    "replies unasked for": (
        Fails("test_a_reply_that_nobody_waits_for_is_dropped"),
        Fails("test_descriptors_beside_a_reply_are_closed"),
    ),
    "descriptors": (
        Fails("test_a_descriptor_may_come_with_any_byte_of_its_message", spoils=True),
        Fails("test_descriptors_may_come_in_two_parts"),
        Fails("test_as_many_descriptors_as_the_kernel_sends_are_closed"),
        Fails("test_descriptors_of_a_message_that_never_ends_are_closed", spoils=True),
        Fails(
            "test_more_descriptors_than_a_command_takes_are_closed_and_refused",
            ("2", "3", "4", "5", "6", "7", "9", "10", "13"),
        ),
        Fails("test_more_descriptors_than_a_command_takes_are_closed_and_refused", ("14",), V1_ONLY),
        Fails("test_more_descriptors_than_a_command_takes_are_closed_and_refused", ("16",), V2_ONLY),
        Fails("test_two_descriptors_are_refused"),
    ),
    "version": (
        Fails("test_a_command_before_version_is_refused"),
        Fails("test_another_major_version_is_refused"),
        Fails("test_the_minor_version_is_the_smaller_of_the_two", ("2-1", "65535-1"), V2_ONLY),
        Fails("test_version_data_and_capabilities_are_optional", good=("text4",)),
        Fails("test_version_data_that_is_wrong_is_refused"),
        Fails("test_version_without_a_body_is_refused"),
        Fails("test_version_without_reply_is_not_answered"),
        Fails("test_qemu_gets_our_limits"),
    ),
    "unread replies": (Fails("test_who_does_not_read_does_not_hold_the_server_up"),),
    "client limits": (
        Fails("test_more_than_max_data_xfer_size_is_refused"),
        Fails("test_the_clients_own_max_dma_maps_counts_too"),
        Fails("test_a_message_has_no_more_descriptors_than_the_client_takes"),
    ),
    "write multi": (
        Fails("test_every_command_that_a_server_has_to_know_works"),
        Fails("test_every_model_answers_every_command"),
        Fails("test_writes_are_done_in_order_whether_or_not_the_capability_was_offered"),
        Fails("test_the_reply_counts_the_writes_that_were_done"),
        Fails("test_a_handler_that_raises_in_one_of_several_writes"),
        Fails("test_the_state_is_written_with_several_writes_at_once"),
    ),
    "large argsz": (Fails("test_a_larger_argsz_is_answered_with_the_size_needed", ("6",)),),
    "mapping a region": (
        Fails("test_a_region_that_can_be_mapped_comes_with_a_descriptor"),
        Fails("test_a_too_small_argsz_is_answered_with_the_size_needed"),
        Fails("test_a_client_cannot_change_the_size_of_the_memory"),
        Fails("test_a_client_that_takes_no_descriptors_gets_no_mapping"),
        Fails("test_the_memory_stays_when_its_client_leaves"),
    ),
    "doorbells": (Fails("test_a_doorbell_of_a_client_that_has_left_rings_nothing"),),
    "sub-region size": (
        Fails("test_doorbells_come_with_an_eventfd_each", abis=V2_ONLY),
        Fails("test_a_too_small_argsz_gets_the_size_and_no_descriptors", abis=V2_ONLY),
    ),
    "DMA map checks": (
        Fails("test_conformance_dma_map::test_a_range_that_cannot_be_is_refused", good=("fd-empty",)),
        Fails("test_a_map_over_an_existing_region_fails_with_eexist", good=("2-8192",)),
        Fails(
            "test_a_region_that_is_mapped_again_as_it_is_leaves_nothing",
            abis=EVERY - {Abi.V2_LIMIT},
            spoils=True,
        ),
        Fails("test_a_region_for_no_access_is_refused", ("0",)),
        Fails("test_a_file_that_does_not_hold_the_region_is_refused"),
        Fails("test_an_offset_that_is_not_aligned_is_refused"),
    ),
    "number of DMA regions": (
        Fails("test_ten_thousand_regions_can_be_mapped"),
        Fails("test_more_regions_than_max_dma_maps_are_refused"),
    ),
    "DMA unmap": (
        Fails("test_an_unmap_that_fits_no_region", good=("unknown",)),
        Fails("test_unmap_of_several_regions_at_once"),
    ),
    "untrusted memory": (
        Fails("test_a_file_that_is_truncated_later_gives_an_error", spoils=True),
        Fails("test_a_descriptor_that_is_no_memory_is_refused", ("socket", "eventfd", "/dev/zero", "/proc")),
        Fails("test_guest_memory_is_copied_and_the_counters_tell_the_way", ("file",)),
    ),
    "DMA by message": (
        Fails("test_a_transition_is_complete_before_the_reply", abis=V2_ONLY),
        Fails("test_guest_memory_is_copied_and_the_counters_tell_the_way", ("message",)),
        Fails("test_a_range_may_cross_regions_of_different_ways"),
        Fails("test_the_device_cannot_write_a_read_only_range", ("message",)),
        Fails("test_a_range_that_is_not_mapped_fails", ("message",)),
        Fails("test_replies_may_come_in_any_order"),
        Fails(
            "test_a_reply_of_the_wrong_length_fails_the_access",
            ("fewer bytes", "more bytes", "no bytes", "count above the data", "half a body"),
        ),
        Fails("test_a_write_reply_may_be_as_real_clients_send_it"),
        Fails("test_a_reply_to_the_other_command_fails_the_access"),
        Fails("test_no_command_waits_for_the_clients_answer"),
        Fails("test_reset_cuts_the_dma_and_late_replies_are_dropped"),
        Fails("test_a_client_that_never_answers_dma_is_served_all_the_same"),
        Fails("test_unmap_while_a_task_waits"),
        Fails("test_another_region_in_place_of_the_one_a_task_waits_for"),
        Fails("test_dma_to_where_nothing_is", ("0-4294967295-4",)),
        Fails("test_dma_to_where_nothing_is", ("4094-4-4",), V2_ONLY),
    ),
    "DMA by message in v1": (
        Fails("test_requests_of_the_server_are_as_specified", abis=V1_ONLY),
        Fails("test_a_request_has_at_most_max_data_xfer_size", abis=V1_ONLY),
        Fails("test_an_error_reply_fails_the_access", ("19-12", "14-12", "0-12", "4294967295-12"), V1_ONLY),
        Fails("test_a_second_reply_is_dropped", abis=V1_ONLY),
        Fails(
            "test_a_reply_of_the_wrong_length_fails_the_access",
            ("count of all bits", "no body", "wrote fewer", "wrote more", "wrote nothing"),
            V1_ONLY,
        ),
        Fails("test_a_client_that_leaves_with_dma_under_way", abis=V1_ONLY),
    ),
    "shared eventfds": (
        Fails("test_msi_and_msix_are_kept_apart"),
        Fails("test_two_messages_with_a_descriptor_each_keep_them_apart"),
    ),
    "disabling vectors": (
        Fails("test_disabling_one_vector_disables_that_one"),
        Fails("test_count_zero_disables_the_index"),
    ),
    "what SET_IRQS brings": (
        Fails("test_vectors_are_used_by_a_client_that_never_writes_the_configuration_space"),
        Fails("test_booleans_choose_the_vectors"),
        Fails("test_a_request_that_cannot_be_is_refused_and_changes_nothing", ("unknown flag",)),
        Fails("test_a_descriptor_that_is_no_eventfd_is_refused"),
        Fails("test_an_eventfd_that_is_full_does_not_hold_the_server_up", spoils=True),
    ),
    "INTx automatic mask": (
        Fails("test_irq_info", ("0-1-7",)),
        Fails("test_intx_masks_itself_and_fires_again_on_unmask_while_the_level_is_high"),
        Fails("test_an_interrupt_storm", ("5-0",)),
    ),
    "mask and resample eventfds": (
        Fails("test_intx_is_unmasked_by_its_resample_eventfd"),
        Fails("test_intx_is_masked_by_a_mask_eventfd"),
    ),
    "SET_IRQS count": (
        Fails("test_a_request_that_cannot_be_is_refused_and_changes_nothing", ("wrap",), V1_ONLY),
    ),
    "reconnect with state": (Fails("test_who_waits_while_a_client_vanishes_is_served"),),
    "v1 states": (
        Fails(
            "test_each_change_of_device_state",
            good=(
                *("0-1", "1-1", "1-3", "1-4", "1-5", "1-7", "2-1", "3-1", "3-4", "3-5", "3-7"),
                *("4-0", "4-1", "4-2", "4-3", "4-4", "4-5", "4-7"),
            ),
        ),
        Fails("test_bits_3_to_31_are_reserved", _numbers(5, 21)),
        Fails("test_bits_3_to_31_are_reserved", _numbers(21, 32), spoils=True),
        Fails("test_the_device_is_stopped_before_the_write_returns", ("2",)),
        Fails("test_what_a_device_that_was_moved_away_owes_is_not_done_for_the_next_client"),
        Fails("test_the_source_goes_on_after_stop_and_copy"),
        Fails("test_a_bad_stream_is_refused_where_it_is_written"),
        Fails("test_an_incomplete_stream_is_refused_where_the_device_is_to_run"),
        Fails("test_the_way_out_of_the_error_state_is_a_reset"),
        Fails("test_conformance_migration_v1::test_reset_leads_to_running_from_every_state", good=("3", "4")),
        Fails(
            "test_conformance_migration_v1::test_a_client_that_vanishes_leaves_the_device_to_the_next",
            good=("3", "4"),
        ),
        Fails("test_logging_ends_with_the_client"),
    ),
    "v1 registers": (
        Fails("test_saving_by_v1_that_raises", ("pending",)),
        Fails("test_the_region_is_announced_by_its_type"),
        Fails("test_a_small_argsz_is_told_what_is_needed"),
        Fails("test_fields_are_accessed_at_their_width_only"),
        Fails("test_between_registers_and_data_there_is_nothing", ("0-0",)),
        Fails("test_reads_of_reserved_return_zero_and_writes_are_ignored"),
        Fails("test_nothing_is_pending_where_nothing_is_saved", good=("4",)),
        Fails("test_data_offset_is_never_zero_and_page_aligned", ("0", "1")),
        Fails("test_a_pending_bytes_of_zero_ends_the_iterations"),
        Fails("test_c_data_size_is_read_after_data_offset"),
        Fails("test_d_data_may_be_mapped"),
        Fails("test_f_pending_bytes_tells_that_the_data_has_been_read"),
        Fails(
            "test_nothing_is_lost_or_twice_when_the_state_changes_within_an_iteration", ("0-o|o", "256K-o|o")
        ),
        Fails("test_the_data_is_written_through_a_mapping"),
        Fails("test_the_whole_data_area_can_be_written_and_not_a_byte_more"),
        Fails("test_a_mapping_that_was_kept_shows_nothing_of_the_next_client"),
        Fails("test_parts_in_another_order_are_refused"),
        Fails("test_who_has_mapped_the_data_cannot_shrink_it"),
    ),
    "v1 dirty pages": (
        Fails("test_a_bitmap_may_have_just_the_bytes_of_its_bits"),
        Fails("test_a_device_that_cannot_tell_has_all_that_it_could_write"),
        Fails("test_a_log_goes_with_its_region"),
        Fails("test_a_range_may_begin_and_end_inside_a_region"),
        Fails("test_a_range_may_span_regions_and_holes"),
        Fails("test_conformance_dirty_v1::test_a_range_that_cannot_be_is_refused", good=("0-100",)),
        Fails("test_a_reply_that_does_not_fit_tells_its_size_and_clears_nothing", good=("8",)),
        Fails("test_a_report_in_coarser_pages", good=("12",)),
        Fails("test_a_write_across_regions_is_logged_where_it_went"),
        Fails(
            "test_an_unmap_that_is_refused_has_lost_nothing",
            ("cut at its end", "cut at its start", "empty", "nothing there", "wraps"),
        ),
        Fails("test_max_bitmap_size_is_negotiated_and_enforced"),
        Fails("test_pages_are_as_large_as_was_agreed_on"),
        Fails("test_the_smaller_page_size_is_agreed_on"),
        Fails("test_our_client_takes_a_bitmap_above_max_data_xfer_size"),
        Fails("test_the_bitmap_of_a_tebibyte_comes_in_one_reply"),
        Fails("test_the_last_page_of_the_address_space"),
        Fails("test_unmap_gives_the_bitmap_of_what_goes"),
        Fails("test_unmap_in_coarser_pages"),
        Fails("test_unmap_of_all_takes_no_range"),
        Fails("test_unmap_of_several_regions_gives_one_bitmap"),
        Fails("test_where_nothing_is_mapped_nothing_is_dirty"),
        Fails("test_writes_by_message_are_not_logged"),
    ),
    "empty accesses": (Fails("test_the_data_is_written_trapped_and_in_parts", abis=V1_ONLY),),
    "P2P": (
        Fails("test_the_reply_to_get_has_the_data_and_its_length"),
        Fails(
            "test_every_state_leads_to_every_other_but_stop_copy_to_pre_copy",
            good=(*_pairs("12346", "12346"), "3-7"),
        ),
        Fails("test_the_device_works_in_running_and_pre_copy_only", ("5", "7")),
        Fails("test_data_is_read_in_the_saving_group_only", ("5",)),
        Fails("test_less_than_was_asked_for_means_that_there_is_no_more", ("7",)),
        Fails("test_data_is_written_in_resuming_only", ("5", "7")),
        Fails("test_conformance_migration_v2::test_reset_leads_to_running_from_every_state", ("5", "7")),
        Fails(
            "test_conformance_migration_v2::test_a_client_that_vanishes_leaves_the_device_to_the_next",
            ("5", "7"),
        ),
    ),
    "v2 features": (
        Fails(
            "test_a_probe_succeeds_if_all_of_the_methods_are_there",
            good=(*_methods("1", "67"), *_methods("2", "18"), *_methods("3", "1678")),
        ),
        Fails("test_an_unknown_feature_is_enotty_whatever_is_asked"),
        Fails("test_the_reply_to_set_is_the_request"),
        Fails("test_a_reply_to_get_that_does_not_fit_tells_the_size_that_is_needed"),
        Fails("test_a_device_that_cannot_be_moved_has_no_such_feature"),
        Fails("test_there_is_no_data_fd"),
        Fails("test_a_state_that_is_cut_short_is_refused", good=("0",)),
    ),
    "v2 states": (
        Fails("test_the_device_works_in_running_and_pre_copy_only", ("3",)),
        Fails("test_resuming_to_stop_fails_when_the_data_is_incomplete"),
        Fails("test_reset_is_the_way_out_of_error"),
        Fails("test_a_state_that_was_refused_leaves_the_device_as_it_was"),
        Fails("test_the_source_goes_on_after_a_migration_that_was_given_up"),
        Fails("test_data_after_the_end_is_refused"),
        Fails("test_posted_writes_are_taken_and_a_bad_one_shows_in_the_state"),
        Fails("test_a_truncated_corrupted_mixed_up_repeated_or_foreign_stream_is_refused"),
        Fails("test_conformance_migration_v2::test_reset_leads_to_running_from_every_state", ("1", "3")),
        Fails(
            "test_conformance_migration_v2::test_reset_leads_to_running_from_every_state",
            ("4", "6"),
            frozenset({Abi.V2_LIMIT}),
        ),
        Fails(
            "test_conformance_migration_v2::test_a_client_that_vanishes_leaves_the_device_to_the_next",
            ("1", "3"),
        ),
        Fails("test_a_client_that_vanishes_in_error_leaves_a_device_that_works"),
        Fails("test_a_client_that_vanishes_with_replies_unread_takes_its_memory_along"),
    ),
    "v2 data": (
        Fails("test_less_than_was_asked_for_means_that_there_is_no_more", ("3", "6")),
        Fails("test_a_reply_is_as_long_as_its_data"),
        Fails("test_there_is_no_reply_payload_and_argsz_does_not_matter"),
        Fails("test_a_size_that_does_not_fit_the_data_is_refused", ("0",)),
    ),
    "v2 dirty pages": (
        Fails("test_conformance_dirty_v2::test_a_range_may_span_regions_and_holes"),
        Fails("test_conformance_dirty_v2::test_logging_ends_with_the_client"),
        Fails("test_conformance_dirty_v2::test_the_last_page_of_the_address_space"),
        Fails("test_conformance_dirty_v2::test_where_nothing_is_mapped_nothing_is_dirty"),
        Fails("test_conformance_dirty_v2::test_writes_by_message_are_not_logged"),
        Fails("test_the_page_size_is_a_hint", good=("12", "16", "21", "30")),
        Fails("test_a_page_size_that_is_no_power_of_two", good=("0",)),
        Fails("test_ranges_that_cannot_be"),
        Fails("test_ranges_are_whole_pages_of_the_page_size"),
        Fails("test_more_ranges_than_follow"),
        Fails("test_conformance_dirty_v2::test_data_that_is_cut_is_refused", good=("0", "1")),
        Fails("test_a_second_start_is_refused"),
        Fails("test_the_pages_of_a_region_that_went_are_reported_once"),
        Fails("test_another_region_in_place_of_one_that_went"),
        Fails("test_the_same_region_again"),
        Fails("test_conformance_dirty_v2::test_a_device_that_cannot_tell_has_all_that_it_could_write"),
        Fails("test_a_read_only_region_is_never_dirty"),
        Fails("test_conformance_dirty_v2::test_a_range_may_begin_and_end_inside_a_region"),
        Fails(
            "test_a_report_in_other_pages_than_those_that_are_tracked",
            ("12-21", "13-12", "13-21", "16-21", "21-21"),
        ),
        Fails(
            "test_a_report_in_other_pages_than_those_that_are_tracked",
            ("12-13", "12-16", "13-16"),
            spoils=True,
        ),
        Fails("test_a_region_that_begins_within_a_page_of_the_report"),
        Fails("test_a_range_need_not_be_whole_pages_of_the_report"),
        Fails(
            "test_a_report_that_cannot_be",
            (
                "page size 2048",
                "not aligned",
                "wraps",
                "wraps by all",
                "above 256 MiB of bitmap",
            ),
        ),
        Fails("test_a_report_that_cannot_be", ("page size 1",), spoils=True),
        Fails("test_the_longest_bitmap_is_what_was_negotiated"),
        Fails("test_conformance_dirty_v2::test_a_reply_that_does_not_fit_tells_its_size_and_clears_nothing"),
        Fails("test_a_question_that_is_cut_is_refused", ("23",)),
        Fails("test_report_without_start_is_refused"),
        Fails("test_conformance_dirty_v2::test_the_bitmap_of_a_tebibyte_comes_in_one_reply"),
        Fails("test_our_client_has_a_method_for_each"),
    ),
    "editions": (
        ModuleFails(
            "test_conformance_migration_v2",
            V1_ONLY,
            {
                "test_unknown_flags_are_refused": _numbers(19, 32),
                "test_one_of_get_set_and_probe_has_to_be_asked_for": ("1", "2", "6", "7", "8"),
                "test_a_method_that_a_feature_does_not_have_is_refused": ("1", "2", "6", "7", "8"),
                "test_a_request_for_data_that_is_cut_short_is_refused": _numbers(8),
            },
        ),
        ModuleFails(
            "test_conformance_dirty_v2",
            V1_ONLY,
            {
                "test_more_ranges_than_follow": ("1", "2", "256"),
                "test_data_that_is_cut_is_refused": ("0", "1", "8", "12", "15"),
                "test_report_without_start_is_refused": ("",),
            },
        ),
        ModuleFails(
            "test_conformance_migration_v1",
            V2_ONLY,
            {
                "test_outside_of_the_region": (
                    *("1052672", "1052669", "4294967296", "18446744073709551615", "18446744073709551612"),
                ),
                "test_pending_bytes_and_data_offset_are_read_only": ("1",),
            },
        ),
        ModuleFails(
            "test_conformance_dirty_v1",
            V2_ONLY,
            {"test_argsz_below_the_structure_is_refused": ("0-1", "0-2", "7-1", "7-2")},
        ),
        Fails("test_saving_by_v1_that_raises", abis=V2_ONLY),
        Fails("test_restoring_by_v1_that_raises", abis=V2_ONLY),
        Fails("test_saving_by_v2_that_raises", abis=V1_ONLY),
        Fails("test_restoring_by_v2_that_raises", abis=V1_ONLY),
        Fails("test_both_editions_have_one_log"),
        Fails("test_what_is_tracked_in_large_pages_is_reported_in_small_ones_to_v1"),
        Fails("test_the_device_is_a_pci_device_that_can_be_reset", abis=V2_ONLY),
        Fails("test_a_session_of_the_other_edition_begins_anew"),
        Fails("test_a_state_of_one_edition_shows_in_the_other"),
        Fails("test_saved_over_one_and_restored_over_the_other"),
        Fails("test_the_registers_do_not_make_a_device_run_that_nobody_has_used"),
    ),
}
ELSEWHERE: Mapping[str, str] = {
    "inherited socket": "tests/conformance/test_serve_bad_input.py",
}
"""Rows without a test that is expected to fail, and where they are shown."""


@functools.cache
def library() -> Library | str:
    """The library that the engine will use, or why there is none."""
    try:
        return find_library(lab=lab_root() / "libvfio-user" / LIBRARY)
    except LibraryError as error:
        return str(error)


def require_library() -> None:
    """Without a library: fails the test in CI, and skips it elsewhere."""
    found = library()
    if isinstance(found, str):
        missing(found)


def edition_of_library() -> str:
    """ "v1" or "v2"; v1 without a library, whose absence the fixture complains of."""
    found = library()
    return "v2" if not isinstance(found, str) and found.abi in V2_ONLY else "v1"


def limit_of(module: str, test: str, case: str) -> Expected | None:
    """The row that lets a case of a test fail with the library that is used."""
    found = library()
    if isinstance(found, str):
        return None
    for limit in LIMITS:
        rows = EXPECTED.get(limit.name, ()) if found.abi in limit.abis else ()
        covering = [fails for fails in rows if fails.covers(module, test, case, found.abi)]
        if covering:
            return Expected(f"{limit.name}: {limit.effect}", any(fails.spoils for fails in covering))
    return None


def ids_of(module: str, test: str) -> frozenset[str]:
    """The cases of a test that any row names."""
    rows = (fails for row in EXPECTED.values() for fails in row)
    return frozenset(case for fails in rows for case in fails.ids(module, test))
