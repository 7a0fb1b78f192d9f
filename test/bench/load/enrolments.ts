/** New devices: each connects, uploads its first key set, and goes. */
import { faultOf } from './claims.ts';
import type { Measurement } from './measurement.ts';
import { ask } from './ready.ts';
import { driveVisits, type VisitsInput } from './visits.ts';

export interface EnrolmentsInput extends VisitsInput {
  /** Key sets, taken in turn: nobody compares one device's keys with another's. */
  uploadInputs: readonly string[];
}

export async function driveEnrolments(input: EnrolmentsInput): Promise<Measurement> {
  const { devices, uploadInputs } = input;
  return await driveVisits(
    input,
    async (socket, index) => {
      const text = await ask(socket, 'uploadKeys', uploadInputs[index % uploadInputs.length]!);
      return text.startsWith('[{"ok":true') ? null : faultOf(text);
    },
    { visitsMax: devices.length },
  );
}
