// Rows of a weight into the panels that `Linear` reads.

#pragma once

#include "linear.h"

// rows: (count, inputs); the panels of these rows are filled whole, with 0 where there is no row. A group that holds a
// NaN or an infinity gets a NaN as its scale.
void pack_rows(Format format, Numbers rows, int64_t count, int64_t inputs, uint8_t* weight, uint16_t* scale);
