"""LIBERO's suites as data: task names, instructions and step limits, so that they can be named without the simulator.

Sources: LIBERO (https://github.com/Lifelong-Robot-Learning/LIBERO, task order 0) and LIBERO-PRO
(https://github.com/Zxy-MLlab/LIBERO-PRO). A task's name is the stem of its BDDL file.
"""

from __future__ import annotations

import re

from vla.types import Task

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps after the settling, as OpenVLA and openpi count them: a little more than the longest demonstration."""

PRO_SUFFIXES = ("_lan", "_object", "_swap", "_task")
"""LIBERO-PRO's suites with complete resources: reworded, other objects, swapped places, other tasks."""

_NAMES = {
    "libero_spatial": """
        pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate
        pick_up_the_black_bowl_next_to_the_ramekin_and_place_it_on_the_plate
        pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate
        pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate
        pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate
        pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate
        pick_up_the_black_bowl_next_to_the_cookie_box_and_place_it_on_the_plate
        pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate
        pick_up_the_black_bowl_next_to_the_plate_and_place_it_on_the_plate
        pick_up_the_black_bowl_on_the_wooden_cabinet_and_place_it_on_the_plate
    """,
    "libero_object": """
        pick_up_the_alphabet_soup_and_place_it_in_the_basket
        pick_up_the_cream_cheese_and_place_it_in_the_basket
        pick_up_the_salad_dressing_and_place_it_in_the_basket
        pick_up_the_bbq_sauce_and_place_it_in_the_basket
        pick_up_the_ketchup_and_place_it_in_the_basket
        pick_up_the_tomato_sauce_and_place_it_in_the_basket
        pick_up_the_butter_and_place_it_in_the_basket
        pick_up_the_milk_and_place_it_in_the_basket
        pick_up_the_chocolate_pudding_and_place_it_in_the_basket
        pick_up_the_orange_juice_and_place_it_in_the_basket
    """,
    "libero_goal": """
        open_the_middle_drawer_of_the_cabinet
        put_the_bowl_on_the_stove
        put_the_wine_bottle_on_top_of_the_cabinet
        open_the_top_drawer_and_put_the_bowl_inside
        put_the_bowl_on_top_of_the_cabinet
        push_the_plate_to_the_front_of_the_stove
        put_the_cream_cheese_in_the_bowl
        turn_on_the_stove
        put_the_bowl_on_the_plate
        put_the_wine_bottle_on_the_rack
    """,
    "libero_10": """
        LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket
        LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket
        KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it
        KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it
        LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate
        STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy
        LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate
        LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket
        KITCHEN_SCENE8_put_both_moka_pots_on_the_stove
        KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it
    """,
    "libero_90": """
        KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet_and_put_the_black_bowl_on_top_of_it
        KITCHEN_SCENE10_put_the_black_bowl_in_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE10_put_the_butter_at_the_back_in_the_top_drawer_of_the_cabinet_and_close_it
        KITCHEN_SCENE10_put_the_butter_at_the_front_in_the_top_drawer_of_the_cabinet_and_close_it
        KITCHEN_SCENE10_put_the_chocolate_pudding_in_the_top_drawer_of_the_cabinet_and_close_it
        KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet
        KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet_and_put_the_bowl_in_it
        KITCHEN_SCENE1_put_the_black_bowl_on_the_plate
        KITCHEN_SCENE1_put_the_black_bowl_on_top_of_the_cabinet
        KITCHEN_SCENE2_open_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE2_put_the_black_bowl_at_the_back_on_the_plate
        KITCHEN_SCENE2_put_the_black_bowl_at_the_front_on_the_plate
        KITCHEN_SCENE2_put_the_middle_black_bowl_on_the_plate
        KITCHEN_SCENE2_put_the_middle_black_bowl_on_top_of_the_cabinet
        KITCHEN_SCENE2_stack_the_black_bowl_at_the_front_on_the_black_bowl_in_the_middle
        KITCHEN_SCENE2_stack_the_middle_black_bowl_on_the_back_black_bowl
        KITCHEN_SCENE3_put_the_frying_pan_on_the_stove
        KITCHEN_SCENE3_put_the_moka_pot_on_the_stove
        KITCHEN_SCENE3_turn_on_the_stove
        KITCHEN_SCENE3_turn_on_the_stove_and_put_the_frying_pan_on_it
        KITCHEN_SCENE4_close_the_bottom_drawer_of_the_cabinet
        KITCHEN_SCENE4_close_the_bottom_drawer_of_the_cabinet_and_open_the_top_drawer
        KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet
        KITCHEN_SCENE4_put_the_black_bowl_on_top_of_the_cabinet
        KITCHEN_SCENE4_put_the_wine_bottle_in_the_bottom_drawer_of_the_cabinet
        KITCHEN_SCENE4_put_the_wine_bottle_on_the_wine_rack
        KITCHEN_SCENE5_close_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE5_put_the_black_bowl_in_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE5_put_the_black_bowl_on_the_plate
        KITCHEN_SCENE5_put_the_black_bowl_on_top_of_the_cabinet
        KITCHEN_SCENE5_put_the_ketchup_in_the_top_drawer_of_the_cabinet
        KITCHEN_SCENE6_close_the_microwave
        KITCHEN_SCENE6_put_the_yellow_and_white_mug_to_the_front_of_the_white_mug
        KITCHEN_SCENE7_open_the_microwave
        KITCHEN_SCENE7_put_the_white_bowl_on_the_plate
        KITCHEN_SCENE7_put_the_white_bowl_to_the_right_of_the_plate
        KITCHEN_SCENE8_put_the_right_moka_pot_on_the_stove
        KITCHEN_SCENE8_turn_off_the_stove
        KITCHEN_SCENE9_put_the_frying_pan_on_the_cabinet_shelf
        KITCHEN_SCENE9_put_the_frying_pan_on_top_of_the_cabinet
        KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf
        KITCHEN_SCENE9_put_the_white_bowl_on_top_of_the_cabinet
        KITCHEN_SCENE9_turn_on_the_stove
        KITCHEN_SCENE9_turn_on_the_stove_and_put_the_frying_pan_on_it
        LIVING_ROOM_SCENE1_pick_up_the_alphabet_soup_and_put_it_in_the_basket
        LIVING_ROOM_SCENE1_pick_up_the_cream_cheese_box_and_put_it_in_the_basket
        LIVING_ROOM_SCENE1_pick_up_the_ketchup_and_put_it_in_the_basket
        LIVING_ROOM_SCENE1_pick_up_the_tomato_sauce_and_put_it_in_the_basket
        LIVING_ROOM_SCENE2_pick_up_the_alphabet_soup_and_put_it_in_the_basket
        LIVING_ROOM_SCENE2_pick_up_the_butter_and_put_it_in_the_basket
        LIVING_ROOM_SCENE2_pick_up_the_milk_and_put_it_in_the_basket
        LIVING_ROOM_SCENE2_pick_up_the_orange_juice_and_put_it_in_the_basket
        LIVING_ROOM_SCENE2_pick_up_the_tomato_sauce_and_put_it_in_the_basket
        LIVING_ROOM_SCENE3_pick_up_the_alphabet_soup_and_put_it_in_the_tray
        LIVING_ROOM_SCENE3_pick_up_the_butter_and_put_it_in_the_tray
        LIVING_ROOM_SCENE3_pick_up_the_cream_cheese_and_put_it_in_the_tray
        LIVING_ROOM_SCENE3_pick_up_the_ketchup_and_put_it_in_the_tray
        LIVING_ROOM_SCENE3_pick_up_the_tomato_sauce_and_put_it_in_the_tray
        LIVING_ROOM_SCENE4_pick_up_the_black_bowl_on_the_left_and_put_it_in_the_tray
        LIVING_ROOM_SCENE4_pick_up_the_chocolate_pudding_and_put_it_in_the_tray
        LIVING_ROOM_SCENE4_pick_up_the_salad_dressing_and_put_it_in_the_tray
        LIVING_ROOM_SCENE4_stack_the_left_bowl_on_the_right_bowl_and_place_them_in_the_tray
        LIVING_ROOM_SCENE4_stack_the_right_bowl_on_the_left_bowl_and_place_them_in_the_tray
        LIVING_ROOM_SCENE5_put_the_red_mug_on_the_left_plate
        LIVING_ROOM_SCENE5_put_the_red_mug_on_the_right_plate
        LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate
        LIVING_ROOM_SCENE5_put_the_yellow_and_white_mug_on_the_right_plate
        LIVING_ROOM_SCENE6_put_the_chocolate_pudding_to_the_left_of_the_plate
        LIVING_ROOM_SCENE6_put_the_chocolate_pudding_to_the_right_of_the_plate
        LIVING_ROOM_SCENE6_put_the_red_mug_on_the_plate
        LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate
        STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy
        STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_left_compartment_of_the_caddy
        STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_right_compartment_of_the_caddy
        STUDY_SCENE1_pick_up_the_yellow_and_white_mug_and_place_it_to_the_right_of_the_caddy
        STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy
        STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy
        STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_left_compartment_of_the_caddy
        STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_right_compartment_of_the_caddy
        STUDY_SCENE3_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy
        STUDY_SCENE3_pick_up_the_book_and_place_it_in_the_left_compartment_of_the_caddy
        STUDY_SCENE3_pick_up_the_book_and_place_it_in_the_right_compartment_of_the_caddy
        STUDY_SCENE3_pick_up_the_red_mug_and_place_it_to_the_right_of_the_caddy
        STUDY_SCENE3_pick_up_the_white_mug_and_place_it_to_the_right_of_the_caddy
        STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf
        STUDY_SCENE4_pick_up_the_book_on_the_left_and_place_it_on_top_of_the_shelf
        STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf
        STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf
    """,
}

# LIBERO-PRO keeps the names where it changes the instruction; what is said stands in the BDDL file only.
_REWORDED = {
    "libero_spatial_lan": """
        lift the black bowl between the plate and ramekin and set it on the plate
        take black bowl next to ramekin and place on plate
        lift the black bowl from the table center and put it on the plate
        lift black bowl from cookie box and put it on plate
        take the black bowl from the top drawer and put it on plate
        grab black bowl on ramekin and set it on plate
        grab the black bowl beside the cookie box and set it on plate
        lift bowl from stove and set on plate
        pick the bowl beside the plate and put it on plate
        lift bowl from cabinet and put on plate
    """,
    "libero_spatial_task": """
        pick the akita black bowl not between the plate and the ramekin and place it on the plate
        pick the akita black bowl next to the cookie box and place it on the plate
        pick the akita black bowl next to the plate and place it on the plate
        pick the akita black bowl on the top of the cabinet and place it on the plate
        pick the akita black bowl on the top of the wooden cabinet and place it on the plate
        pick the akita black bowl on the cookie box and place it on the plate
        pick the akita black bowl on the stove and place it on the plate
        pick the akita black bowl on the top of the cabinet and place it on the plate
        pick the akita black bowl next to the ramekin and place it on the plate
        pick the akita black bowl on the stove and place it on the plate
    """,
    "libero_object_lan": """
        grab alphabet soup and put it into basket
        grab cream cheese and put into basket
        grab salad dressing and put into basket
        pick up bbq sauce and put it into basket
        lift ketchup and put it in basket
        pick tomato sauce and put it in basket
        grab butter and put it into basket
        grab milk and put into basket
        lift chocolate pudding and put it in basket
        pick orange juice and put into basket
    """,
    "libero_object_task": """
        pick the cream cheese and place it in the basket
        pick the alphabet soup and place it in the basket
        pick the tomato sauce and place it in the basket
        pick the ketchup and place it in the basket
        pick the milk and place it in the basket
        pick the bbq sauce and place it in the basket
        pick the orange juice and place it in the basket
        pick the butter and place it in the basket
        pick the salad dressing and place it in the basket
        pick the chocolate pudding and place it in the basket
    """,
    "libero_goal_lan": """
        open the cabinet’s middle drawer
        place the bowl on the stove
        place the wine bottle on top of the cabinet
        slide open the top drawer and place the bowl in it
        place the bowl on top of the cabinet
        move the plate to the stove’s front
        place the cream cheese inside the bowl
        switch on the stove
        place the bowl on top of the plate
        place the wine bottle on the rack
    """,
    "libero_goal_task": """
        open the bottom drawer of the cabinet
        put the plate on the stove
        put the wine bottle in the bowl
        open the top layer of the drawer and put the cream cheese inside
        put the plate on the top of the drawer
        push the cream cheese to the front of the stove
        put the wine bottle in the bowl
        turn off the stove
        put the wine bottle on the plate
        put the cream cheese on the rack
    """,
    "libero_10_lan": """
        place alphabet soup and tomato sauce into basket
        place cream cheese box and butter into basket
        switch stove on and put moka pot on it
        put black bowl inside bottom drawer and close it
        place white mug on left plate and yellow-white mug on right plate
        pick up the book and place in back compartment
        place white mug on plate and chocolate pudding to right
        put alphabet soup and cream cheese box in basket
        place both moka pots on stove
        place yellow and white mug in microwave and close door
    """,
    "libero_10_task": """
        put both the cream cheese and the tomato sauce in the basket
        put both the alphabet soup and the butter in the basket
        turn on the stove and put the pan on it
        put the bottle in the bottom drawer of the cabinet and close it
        put the yellow and white mug on the left plate and put the white mug on the right plate
        pick up the cup and place it in the back compartment of the caddy
        put the red mug on the plate and put the chocolate pudding to the right of the plate
        put both the ketchup and the cream cheese box in the basket
        put the left moka pot on the stove
        put the white mug in the microwave and close it
    """,
}

PRO_SUITES = tuple(base + suffix for base in MAX_STEPS if base != "libero_90" for suffix in PRO_SUFFIXES)
SUITE_NAMES = (*MAX_STEPS, *PRO_SUITES)


def base_suite(suite: str) -> str:
    """`libero_goal` for `libero_goal_swap`: the suite whose task names and step limit hold."""
    return next(base for base in MAX_STEPS if suite == base or suite[len(base) :] in PRO_SUFFIXES)


def suite_tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of one of `SUITE_NAMES` in the benchmark's order."""
    base = base_suite(suite)
    names = _NAMES[base].split()
    reworded = [line.strip() for line in _REWORDED.get(suite, "").strip().splitlines()]
    instructions = reworded or [instruction_of(name) for name in names]
    return tuple(Task(name, said, MAX_STEPS[base]) for name, said in zip(names, instructions, strict=True))


def instruction_of(name: str) -> str:
    """The instruction that a task's name spells, without its scene: what policies are trained and evaluated with.

    The `:language` of the BDDL file differs from it in spatial, object and goal ("akita black bowl").
    """
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")
