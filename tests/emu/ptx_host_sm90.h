/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of ptx_sm90.cuh on the emulated machine. Included by ptx_host.h alone.
 */
#ifndef EMU_PTX_HOST_SM90_H
#define EMU_PTX_HOST_SM90_H

#endif /* EMU_PTX_HOST_SM90_H */
